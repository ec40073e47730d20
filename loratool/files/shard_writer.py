"""One output file while it is written and brought to stable storage, at the same time."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratool.files.digests import Digest, digest_of_range
from loratool.files.journal import FinishedShard
from loratool.files.safefile import Layout, LocalSource, write_fully
from loratool.files.sink import PAGE, Arrived, Destination, Memory, piece_of, pieces_of
from loratool.files.stopwatch import lap
from loratool.files.system import (
    NOT_DIRECT,
    clone_range,
    create_file,
    is_in_memory,
    open_direct,
    reserve,
    sync_bytes,
    sync_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from loratool.files.seen import Seen
    from loratool.files.source import Source
    from loratool.files.staging import Stage

# into one file in memory at a time: a kernel lets one in, and others spin; the second is there for when the first waits
# for Python's lock
WRITERS = 2
RESERVED = 64 << 20  # bytes whose pages are taken at a time
MOST_KEPT = 1024  # pages that wait for the rest of their bytes
SYNC_CHUNK = 256 << 20  # bytes after which what lies in the page cache is sent to the disk


Pieces = list[tuple[int, bytes]]  # of a page, each with its place in the file


class LocalFolder(Destination):
    """A stage's folder as the destination of a merge; the stage knows which files are finished."""

    def __init__(self, stage: Stage, sha256: bool = False) -> None:
        self.stage, self.sha256, self.memory = stage, sha256, Memory()

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        return self.stage.finished

    def open(self, name: str, layout: Layout, stop: threading.Event) -> LocalFile:
        path = self.stage.folder / name
        if path.parent != self.stage.folder:  # never the folder itself: a run that was stopped may have removed it
            path.parent.mkdir(parents=True, exist_ok=True)
        return LocalFile(path, layout, stop, self.memory, partial(self.record, name), self.sha256)

    def record(self, name: str, seen: Seen, digest: Digest) -> None:
        self.stage.record(FinishedShard(name, digest, seen))


class OpenFile:
    """A file of full length that is written at any places, `size` bytes in all.

    Where the file system allows, whole pages go straight to the disk (O_DIRECT): the page cache would take a copy of
    every byte, and throw out the base for it.
    """

    def __init__(
        self, path: Path, descriptor: int, start: int, size: int, stop: threading.Event, memory: Memory
    ) -> None:
        """`start` is the first byte that is written; room for `size` bytes from there on is reserved."""
        self.path, self.descriptor, self.stop, self.memory = path, descriptor, stop, memory
        self.start, self.size, self.in_memory = start, size, is_in_memory(descriptor)
        self.opened = self.direct = open_direct(path, descriptor, size, start) if size >= PAGE else None
        self.clones = True  # until the file system has refused to
        self.cached = 0  # bytes that went into the page cache; about right is enough
        self.turns: AbstractContextManager[object] = threading.Semaphore(WRITERS) if self.in_memory else nullcontext()
        self.written = Arrived(stop)
        self.keeping = threading.Lock()
        self.kept: dict[int, Pieces] = {}  # page → its pieces so far

    def part(self, at: int, count: int) -> LocalPart:
        return LocalPart(self, at, at + count)

    def write(self, memory: memoryview, at: int) -> None:
        """Write bytes, of which pages as a whole go straight to the disk if `memory` is aligned as the file is."""
        if self.opened is None:
            self.write_cached(memory, at)
            return
        end = at + len(memory)
        first = min(-(-at // PAGE) * PAGE, end)
        last = max(first, end // PAGE * PAGE)
        self.keep(memory[: first - at], at)
        self.write_pages(memory[first - at : last - at], first)
        self.keep(memory[last - at :], last)

    def keep(self, piece: memoryview, at: int) -> None:
        """Keep what fills no page until the rest of its page is there, for whoever sees the file to its end.

        Through the page cache it would hold up all direct writes: a file takes one or the others at a time.
        """
        if not piece:
            return
        with self.keeping:
            self.kept.setdefault(at // PAGE, []).append((at, bytes(piece)))
            full = len(self.kept) > MOST_KEPT and self.kept.pop(at // PAGE)
        if full:
            self.write_together(full)

    def write_kept(self, all_of_it: bool) -> None:
        """Write the pages of which every byte has come, or all that was kept."""
        with self.keeping:
            ready = [page for page, pieces in self.kept.items() if all_of_it or is_page(pieces)]
            taken = [self.kept.pop(page) for page in ready]
        for pieces in taken:
            self.write_together(pieces)

    def write_together(self, pieces: Pieces) -> None:
        """Write pieces of one page, as a page if they are all of it."""
        if not is_page(pieces):
            for at, piece in pieces:
                self.write_cached(memoryview(piece), at)
            return
        page = memoryview(mmap.mmap(-1, PAGE))
        for at, piece in pieces:
            page[at % PAGE : at % PAGE + len(piece)] = piece
        self.write_pages(page, pieces[0][0] // PAGE * PAGE)

    def write_pages(self, pages: memoryview, at: int) -> None:
        """Write straight to the disk, or through the page cache once the file system has refused that."""
        if not pages:
            return
        direct = self.direct  # another worker may drop it meanwhile
        if direct is not None:
            try:
                write_fully(direct, pages, at)
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise
                self.direct = direct = None
        if direct is None:
            self.write_cached(pages, at)

    def write_cached(self, memory: memoryview, at: int) -> None:
        """Write through the page cache."""
        with self.turns:
            write_fully(self.descriptor, memory, at)
        self.cached += len(memory)

    def copy_cached(self, source: LocalSource, start: int, count: int, at: int) -> None:
        """Copy from another file through the page cache."""
        with self.turns:
            source.copy_to(self.descriptor, start, count, at)
        self.cached += count

    def reserve(self) -> None:
        """Take the pages of a file that lies in memory, while the first bytes are read and computed.

        A kernel takes pages for one file one after the other, and whoever writes would wait for them.
        """
        for at in range(self.start, self.start + self.size, RESERVED):
            if self.stop.is_set() or not reserve(self.descriptor, at, min(RESERVED, self.start + self.size - at)):
                break
        lap("reserve")

    def finish(self) -> bool:
        """Bring the file to stable storage while it is being written, and all of it in the end; then close it.

        Meanwhile only what is in the page cache is sent to the disk: a disk that syncs takes no direct writes.
        When the merge is being stopped the file may be gone, and stays open: a worker may still be writing.
        """
        if self.in_memory:
            self.reserve()
        synced, seen, size = 0, 0, self.size
        while seen < size and self.written.wait_for(min(seen + SYNC_CHUNK, size)):
            seen, cached = self.written.count, self.cached
            lap("wait")
            self.write_kept(all_of_it=False)
            lap("write")
            if seen < size and cached - synced >= SYNC_CHUNK:
                sync_bytes(self.descriptor)
                synced = cached
                lap("sync")
        if seen < size:
            return False
        self.write_kept(all_of_it=True)  # the page with the end of the header, too, and the last one
        sync_file(self.descriptor)
        lap("sync")
        if self.stop.is_set():
            return False
        self.look_again()
        self.close()
        return True

    def look_again(self) -> None:
        """Called when all bytes are on stable storage, before the file is closed."""

    def close(self) -> None:
        """Close the file; where it is closed already, nothing happens."""
        descriptors, self.descriptor, self.opened = (self.descriptor, self.opened), -1, None
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)


def is_page(pieces: Pieces) -> bool:
    """Whether these are all bytes of a page."""
    return sum(len(piece) for _, piece in pieces) == PAGE


class LocalFile(OpenFile):
    """The sink of one file on this machine. With `sha256` it is read once more in the end, for its SHA-256."""

    def __init__(
        self,
        path: Path,
        layout: Layout,
        stop: threading.Event,
        memory: Memory,
        record: Callable[[Seen, Digest], None],
        sha256: bool = False,
    ) -> None:
        self.recorder, self.wants_sha256, self.sha256 = record, sha256, ""
        descriptor = create_file(path)
        os.truncate(descriptor, layout.size)
        super().__init__(path, descriptor, 0, layout.size, stop, memory)
        try:
            write_fully(self.descriptor, layout.header, 0)
        except BaseException:
            self.close()
            raise
        self.written.add(len(layout.header) + layout.padding)  # padding is zero, as the whole file is so far

    def look_again(self) -> None:
        if self.wants_sha256:
            self.sha256 = digest_of_range(LocalSource(self.path, self.descriptor), 0, self.size, hashlib.sha256)

    def record(self, seen: Seen, digest: Digest) -> None:
        self.recorder(seen, replace(digest, sha256=self.sha256))


class LocalPart:
    """A part of a local file. What does not fill a page is kept, and written with the piece that comes next."""

    def __init__(self, file: OpenFile, at: int, stop: int) -> None:
        self.file, self.at, self.stop = file, at, stop
        self.rest = b""  # bytes before `at` that are not written yet, less than a page of them

    def put(self, memory: memoryview) -> None:
        before = self.at % PAGE
        begin = before - len(self.rest)
        memory[begin:before] = self.rest
        start, self.at = self.at - len(self.rest), self.at + len(memory) - before
        kept = 0 if self.at == self.stop or self.file.opened is None else min(self.at % PAGE, len(memory) - begin)
        ready = len(memory) - kept
        self.rest = bytes(memory[ready:])
        self.file.write(memory[begin:ready], start)
        self.file.written.add(ready - begin)
        lap("write", ready - begin)

    def copy(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        """Share the blocks of whole pages with the source, write what was read straight to the disk, or copy in the kernel.

        The kernel copies by way of the page cache, whose fresh memory takes longer to get than the bytes to be read and
        written; so it only does where there are no direct writes.
        """
        first = min(count, -self.at % PAGE)
        pages = (count - first) // PAGE * PAGE
        if self.clone(source, start + first, pages, self.at + first):
            self.carry(source, start, first, look)
            if look is not None:
                for at, held in pieces_of(source, start + first, pages, self.at, self.file.memory):
                    lap("read", len(piece_of(held, at)))
                    look(piece_of(held, at))
            self.move_on(pages)
            self.carry(source, start + first + pages, count - first - pages, look)
        elif look is None and isinstance(source, LocalSource) and self.file.opened is None:
            self.file.copy_cached(source, start, count, self.at)
            self.move_on(count)
            lap("copy", count)
        else:
            self.carry(source, start, count, look)

    def clone(self, source: Source, start: int, count: int, at: int) -> bool:
        """Let the file system share whole pages; False where it does not."""
        if not count or not self.file.clones or not isinstance(source, LocalSource) or start % PAGE:
            return False
        cloned = clone_range(source.descriptor, self.file.descriptor, count, start, at)
        self.file.clones = self.file.clones and cloned
        lap("share", count if cloned else 0)
        return cloned

    def move_on(self, count: int) -> None:
        """Account for bytes that have come without being put."""
        self.at += count
        self.file.written.add(count)

    def carry(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        """Read, and write or copy inside the kernel what was looked at."""
        begin = self.at
        for at, held in pieces_of(source, start, count, begin, self.file.memory):
            if self.file.stop.is_set():
                return
            piece = piece_of(held, at)
            lap("read", len(piece))
            if look is not None:
                look(piece)
            if self.file.opened is not None or not isinstance(source, LocalSource):
                self.put(held)
            else:
                self.file.copy_cached(source, start + at - begin, len(piece), at)
                self.move_on(len(piece))
                lap("write", len(piece))
