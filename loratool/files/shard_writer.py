"""One output file while it is written, hashed and brought to stable storage, all at the same time."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from loratool.files.digests import Digester
from loratool.files.journal import FinishedShard
from loratool.files.safefile import LocalSource, write_fully
from loratool.files.sink import PAGE, Arrived, Memory, part_of
from loratool.files.system import NOT_DIRECT, create_file, open_direct, sync_bytes, sync_file

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from loratool.files.digests import Digest
    from loratool.files.journal import Seen
    from loratool.files.safefile import Layout
    from loratool.files.source import Source
    from loratool.files.staging import Stage

SYNC_CHUNK = 256 << 20  # bytes after which what lies in the page cache is sent to the disk


class LocalFolder:
    """A stage's folder as the destination of a merge; the stage knows which files are finished."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.memory = stage, Memory()

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        return self.stage.finished

    def rounds(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        return [names]  # all at once

    def open(self, name: str, layout: Layout, stop: threading.Event) -> LocalFile:
        path = self.stage.folder / name
        if path.parent != self.stage.folder:  # never the folder itself: a run that was stopped may have removed it
            path.parent.mkdir(parents=True, exist_ok=True)
        return LocalFile(path, layout, stop, self.memory, partial(self.record, name))

    def record(self, name: str, digest: Digest, seen: Seen) -> None:
        self.stage.record(FinishedShard(name=name, digest=digest, **vars(seen)))


class LocalFile:
    """The sink of one file on this machine, which is hashed in the file's order.

    Where the file system allows, parts go straight to the disk (O_DIRECT): the page cache would take a copy of
    every byte, and throw out the base for it.
    """

    def __init__(
        self, path: Path, layout: Layout, stop: threading.Event, memory: Memory, record: Callable[[Digest, Seen], None]
    ) -> None:
        self.layout, self.stop, self.memory, self.recorder = layout, stop, memory, record
        self.descriptor = create_file(path)
        os.truncate(self.descriptor, layout.size)
        whole_pages = layout.size >= PAGE
        self.opened = self.direct = open_direct(path, self.descriptor, layout.size) if whole_pages else None
        self.digest = Digester()
        self.hashed, self.written = Arrived(stop), Arrived(stop)  # from the file's start, and anywhere
        self.rest = b""  # hashed bytes since the last whole page, which the next part's write begins with
        try:
            self.begin(memoryview(bytearray(layout.header)))
        except BaseException:
            self.close()
            raise

    def begin(self, header: memoryview) -> None:
        """Write the header."""
        write_fully(self.descriptor, header, 0)
        with self.turn(header, 0):
            self.rest = bytes(header[len(header) // PAGE * PAGE :])
        self.written.add(len(header))

    def put(self, memory: memoryview, at: int) -> None:
        """Hash and write a part; the bytes before it in `memory` are overwritten."""
        before, part = at % PAGE, part_of(memory, at)
        if self.opened is None:
            write_fully(self.descriptor, part, at)
        with self.turn(part, at) as mine:
            if mine and self.opened is not None:
                memory[:before] = self.rest
                self.rest = bytes(memory[len(memory) // PAGE * PAGE :])
        if mine and self.opened is not None:
            last = at + len(part) == self.layout.size
            pages = len(memory) // PAGE * PAGE
            self.write_pages(memory[:pages], at - before)
            write_fully(self.descriptor, memory[pages:] if last else b"", at - before + pages)
        self.written.add(len(part))

    def copy(self, source: Source, start: int, count: int, at: int) -> None:
        """Put a part of an input, inside the kernel where there are no direct writes; it is read for the digest alike."""
        memory = self.memory.of(at % PAGE + count)
        part = part_of(memory, at)
        source.read(start, count, part)
        if self.opened is not None or not isinstance(source, LocalSource):
            self.put(memory, at)
            return
        source.copy_to(self.descriptor, start, count, at)
        with self.turn(part, at):
            pass
        self.written.add(count)

    @contextmanager
    def turn(self, part: memoryview, at: int) -> Iterator[bool]:
        """Hash a part when all before it is hashed, and hold up those after it; False when the merge is being stopped."""
        mine = self.hashed.wait_for(at)
        if mine:
            self.digest.update(part)
        yield mine
        if mine:
            self.hashed.add(len(part))

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

    def finish(self) -> bool:
        """Bring the file to stable storage while it is being written, and all of it in the end; then close it.

        When the merge is being stopped the file may be gone, and stays open: a worker may still be writing.
        """
        synced, size = 0, self.layout.size
        while synced < size and self.written.wait_for(min(synced + SYNC_CHUNK, size)):
            synced = self.written.count
            if synced < size:
                sync_bytes(self.descriptor)
        if synced < size:
            return False
        sync_file(self.descriptor)
        if self.stop.is_set():
            return False
        self.close()
        return True

    def close(self) -> None:
        """Close the file; where it is closed already, nothing happens."""
        descriptors, self.descriptor, self.opened = (self.descriptor, self.opened), -1, None
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)

    def record(self, seen: Seen) -> None:
        self.recorder(self.digest.digest(), seen)
