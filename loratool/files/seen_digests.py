"""The digests of a base, from the bytes that are read of it anyway; what nobody has read is read in the end."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.files.digests import State, Tree, chunk_cuts, digest_of_range, new_state
from loratool.files.process import on_all_cores

if TYPE_CHECKING:
    from loratool.files.safefile import SafeFile


class Chunk:
    """Bytes `start` … `stop` of a file, on their way to a digest in the order in which they stand."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.at = start  # up to here they are in `state`
        self.state: State = new_state()
        self.digest = ""
        self.lock = threading.Lock()

    def see(self, at: int, data: memoryview) -> None:
        """Take bytes of it, from byte `at` of the file on, where they are the next ones and nobody else is at it."""
        if self.digest or not at <= self.at < at + len(data) or not self.lock.acquire(blocking=False):
            return
        try:
            if self.at >= at:
                self.state.update(data[self.at - at :])
                self.at = at + len(data)
            if self.at == self.stop:
                self.digest = self.state.hexdigest()
        finally:
            self.lock.release()


class SeenDigests:
    """Of some weight files; all threads that read them tell it."""

    def __init__(self, files: Iterable[SafeFile]) -> None:
        self.chunks: dict[Path, list[Chunk]] = {}
        for file in files:
            cuts = [(file.position(info), chunk_cuts(info)) for info in file.layout.in_order]
            own = [Chunk(start + a, start + b) for start, each in cuts for a, b in pairwise(each) if b > a]
            self.chunks[file.path] = sorted(own, key=lambda chunk: chunk.start)
        self.starts = {path: [chunk.start for chunk in own] for path, own in self.chunks.items()}

    def has(self, file: SafeFile) -> bool:
        """Whether a file is among them."""
        return file.path in self.chunks

    def share(self, other: SeenDigests) -> None:
        """Know what another one knows, and will know, of the files that both are about."""
        for path in self.chunks.keys() & other.chunks.keys():
            self.chunks[path] = other.chunks[path]

    def chunk_at(self, file: SafeFile, at: int) -> Chunk | None:
        """The chunk that a byte of a file is in."""
        if file.path not in self.starts or (number := bisect_right(self.starts[file.path], at) - 1) < 0:
            return None
        found = self.chunks[file.path][number]
        return found if at < found.stop else None

    def saw(self, file: SafeFile, at: int, data: memoryview) -> None:
        """Bytes of a file were read, from byte `at` on."""
        while len(data) and (chunk := self.chunk_at(file, at)) is not None:
            part = data[: chunk.stop - at]
            chunk.see(at, part)
            data, at = data[len(part) :], at + len(part)

    def note(self, file: SafeFile, at: int, count: int, digest: str) -> None:
        """Somebody else knows the digest of some bytes."""
        chunk = self.chunk_at(file, at)
        if chunk is not None and (chunk.start, chunk.stop) == (at, at + count):
            chunk.digest = digest

    def tree(self, file: SafeFile) -> Tree:
        """The digests of a file; what is not known of it is read now, on all cores."""
        with file.open() as source:
            missing = [chunk for chunk in self.chunks[file.path] if not chunk.digest]
            digests = on_all_cores(lambda each: digest_of_range(source, each.start, each.stop, new_state), missing)
            for chunk, digest in zip(missing, digests, strict=True):
                chunk.digest = digest
            file.check_unchanged(source)
        known = {chunk.start: chunk.digest for chunk in self.chunks[file.path]}
        empty = new_state().hexdigest()
        starts = ((info, file.position(info)) for info in file.layout.in_order)
        listed = {
            info.name: tuple(known[start + a] if b > a else empty for a, b in pairwise(chunk_cuts(info)))
            for info, start in starts
        }
        return Tree.of(file.layout, listed)
