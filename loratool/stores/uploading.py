"""The sink of a part of a file in a store: pieces are sent as soon as all of their bytes are there."""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_right
from typing import TYPE_CHECKING

from loratool.files.sink import Arrived, piece_of, pieces_of
from loratool.files.stopwatch import lap

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratool.files.digests import Digest
    from loratool.files.part_records import SharedOutput
    from loratool.files.safefile import Layout
    from loratool.files.seen import Seen
    from loratool.files.source import Source
    from loratool.stores.upload_part import Piece, UploadPart


class UploadedPart:
    """One part of a file, of which each piece is in memory from its first byte until it is sent."""

    def __init__(
        self,
        output: SharedOutput,
        send: Callable[[UploadPart, Piece, mmap.mmap], str],
        part: UploadPart,
        layout: Layout,
        stop: threading.Event,
    ) -> None:
        """`send` brings a piece of the part to the store, and gives its ETag."""
        self.output, self.send, self.upload, self.layout = output, send, part, layout
        self.arrived = Arrived(stop)  # bytes that are in the store
        self.pieces = part.pieces
        self.lock = threading.Lock()
        # by number, those that have bytes; of such memory only what was written to is resident, and it goes at once
        self.held: dict[int, mmap.mmap] = {}
        self.missing = {piece.number: piece.size for piece in self.pieces}
        self.tags: dict[int, str] = {}

    def part(self, at: int, count: int) -> PartBytes:  # noqa: ARG002 (all of them are taken)
        return PartBytes(self, at)

    def take(self, at: int, data: memoryview) -> None:
        """Take bytes of the file, and send what they complete."""
        while len(data):
            piece = self.pieces[bisect_right(self.upload.cuts, at) - 1]
            some = data[: piece.stop - at]
            with self.lock:
                if piece.number not in self.held:
                    self.held[piece.number] = mmap.mmap(-1, piece.size)
                held = self.held[piece.number]
            held[at - piece.start : at - piece.start + len(some)] = some
            with self.lock:
                self.missing[piece.number] -= len(some)
                full = not self.missing[piece.number]
                if full:
                    del self.held[piece.number]
            if full:
                self.tags[piece.number] = self.send(self.upload, piece, held)
                self.arrived.add(piece.size)
                lap("write", piece.size)
            del held
            at, data = at + len(some), data[len(some) :]

    def finish(self) -> bool:
        """Bring what belongs to no chunk, and wait until all of the part is in the store."""
        for fringe in self.upload.fringes:
            for done in range(0, fringe.size, 4 << 20):
                if self.arrived.stop.is_set():
                    return False
                content = bytearray(min(4 << 20, fringe.size - done))
                at = fringe.at + done
                if fringe.source is not None:
                    fringe.source.fill(fringe.start + done, memoryview(content))
                else:  # of the header; padding is zero
                    some = self.layout.header[at : at + len(content)]
                    content[: len(some)] = some
                self.take(at, memoryview(content))
        return self.arrived.wait_for(self.upload.size)

    def record(self, seen: Seen, digest: Digest) -> None:
        self.output.record_part(self.upload, digest, seen, {"tags": [self.tags[piece.number] for piece in self.pieces]})

    def close(self) -> None:
        """Let go of what is in memory."""
        self.held.clear()


class PartBytes:
    """Takes the bytes of a chunk, or of several, in their order."""

    def __init__(self, file: UploadedPart, at: int) -> None:
        self.file, self.at = file, at

    def put(self, memory: memoryview) -> None:
        piece = piece_of(memory, self.at)
        self.file.take(self.at, piece)
        self.at += len(piece)

    def copy(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        for at, held in pieces_of(source, start, count, self.at, self.file.output.memory):
            lap("read", len(piece_of(held, at)))
            if look is not None:
                look(piece_of(held, at))
            self.put(held)
