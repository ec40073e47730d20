"""One output file while it is written, hashed and brought to stable storage, all at the same time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from loratool.files.digests import Digester
from loratool.files.inputs import open_regular
from loratool.files.safefile import SafeFile, copy_bytes, read_exactly, write_fully

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loratool.merging.output_layout import ShardPlan

PAGE = max(4096, mmap.PAGESIZE)  # what a direct write begins and ends at, in the file and in memory
SYNC_CHUNK = 256 << 20  # bytes after which what lies in the page cache is sent to the disk
NOT_DIRECT = {errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP, errno.ENOSYS}
send = getattr(os, "fdatasync", os.fsync)


class OutputShard:
    """One output file. Any thread may put any part of it; what was put is hashed in the file's order.

    Where the file system allows, parts go straight to the disk (O_DIRECT): the page cache would take a copy of
    every byte, and throw out the base for it.
    """

    def __init__(self, plan: ShardPlan, folder: Path, stop: threading.Event) -> None:
        self.plan, self.stop = plan, stop
        path = folder / plan.name
        if path.parent != folder:  # never `folder` itself: a run that was stopped may have removed it
            path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self.descriptor = os.open(path, flags, 0o666)
        os.truncate(self.descriptor, plan.layout.size)
        self.opened = self.direct = open_direct(path, self.descriptor, plan.layout.size)
        self.sources: dict[Path, tuple[SafeFile, int]] = {}
        self.changed = threading.Condition()
        self.digest = Digester()
        self.hashed = self.written = 0  # bytes: from the file's start, and anywhere
        self.rest = b""  # hashed bytes since the last whole page, which the next part's write begins with
        header = memoryview(bytearray(plan.layout.header))
        write_fully(self.descriptor, header, 0)
        with self.turn(header, 0):
            self.rest = bytes(header[len(header) // PAGE * PAGE :])
        self.wrote(len(header))

    def source(self, file: SafeFile) -> int:
        """A descriptor of an input of this shard, open until the shard is closed."""
        with self.changed:
            if file.path not in self.sources:
                descriptor = open_regular(file.path)
                self.sources[file.path] = (file, descriptor)
                file.check_unchanged(descriptor)
            return self.sources[file.path][1]

    def put(self, memory: memoryview, at: int) -> None:
        """Hash and write the part at byte `at` of the file; all parts before it have been put or are on their way.

        `memory` begins with a page, and the part at byte `at % PAGE` of it; the bytes before get overwritten.
        """
        before = at % PAGE
        part = memory[before:]
        if self.opened is None:
            write_fully(self.descriptor, part, at)
        with self.turn(part, at) as mine:
            if mine and self.opened is not None:
                memory[:before] = self.rest
                self.rest = bytes(memory[len(memory) // PAGE * PAGE :])
        if mine and self.opened is not None:
            last = at + len(part) == self.plan.layout.size
            pages = len(memory) // PAGE * PAGE
            self.write_pages(memory[:pages], at - before)
            write_fully(self.descriptor, memory[pages:] if last else b"", at - before + pages)
        self.wrote(len(part))

    def copy(self, file: SafeFile, start: int, memory: memoryview, at: int) -> None:
        """Put a part that is found at byte `start` of an input; `memory` as for `put`."""
        source, part = self.source(file), memory[at % PAGE :]
        read_exactly(source, part, start, file.path)
        if self.opened is not None:
            self.put(memory, at)
            return
        copy_bytes(source, self.descriptor, len(part), start, at, file.path)
        with self.turn(part, at):
            pass
        self.wrote(len(part))

    @contextmanager
    def turn(self, part: memoryview, at: int) -> Iterator[bool]:
        """Hash a part when all before it is hashed, and hold up those after it; False when the merge is being stopped."""
        mine = self.wait("hashed", at)
        if mine:
            self.digest.update(part)
        yield mine
        if mine:
            with self.changed:
                self.hashed = at + len(part)
                self.changed.notify_all()

    def write_pages(self, pages: memoryview, at: int) -> None:
        """Write straight to the disk, or through the page cache once the file system has refused that."""
        direct = self.direct  # another worker may drop it meanwhile
        if direct is not None:
            try:
                write_fully(direct, pages, at)
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise
                self.direct = direct = None
        if direct is None:
            write_fully(self.descriptor, pages, at)

    def wrote(self, count: int) -> None:
        with self.changed:
            self.written += count
            self.changed.notify_all()

    def wait(self, what: str, amount: int) -> bool:
        """Until `hashed` or `written` has come to `amount`; False when the merge is being stopped."""
        with self.changed:
            while getattr(self, what) < amount and not self.stop.is_set():
                self.changed.wait(0.2)
            return not self.stop.is_set()

    def sync(self) -> bool:
        """Bring the file to stable storage while it is being written, and all of it in the end.

        False when the merge is being stopped: the file may be gone by then.
        """
        synced, size = 0, self.plan.layout.size
        while synced < size and self.wait("written", min(synced + SYNC_CHUNK, size)):
            synced = self.written
            if synced < size:
                send(self.descriptor)
        if synced < size:
            return False
        os.fsync(self.descriptor)
        return not self.stop.is_set()

    def close(self) -> None:
        for _, descriptor in self.sources.values():
            os.close(descriptor)
        os.close(self.descriptor)
        if self.opened is not None:
            os.close(self.opened)


def open_direct(path: Path, descriptor: int, size: int) -> int | None:
    """A descriptor of a file that is open already which writes past the page cache; None where there is none."""
    if not hasattr(os, "O_DIRECT") or size < PAGE:
        return None
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with suppress(AttributeError, OSError):  # without blocks of its own each direct write would lock the whole file
        reserve = ctypes.CDLL(None, use_errno=True).fallocate64
        reserve(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    return direct
