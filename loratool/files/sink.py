"""`Sink`: takes the bytes of one output file as they are made, and knows nothing of how they are made.

The engine asks for parts that together are every byte after the header. Parts come in any order, from any threads; the
bytes of one part come from one thread, piece after piece.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratool.files.digests import Digest
    from loratool.files.journal import FinishedShard
    from loratool.files.safefile import Layout
    from loratool.files.seen import Seen
    from loratool.files.source import Source

PAGE = max(4096, mmap.PAGESIZE)  # bytes: what a direct write begins and ends at, in the file and in memory
COPY_PIECE = 4 << 20  # bytes of an input that are in memory at a time while they are copied


class Part(Protocol):
    """Takes the bytes of one part of a file in their order, from one thread."""

    def put(self, memory: memoryview) -> None:
        """Take the next bytes, those for byte `at` of the file, which are `piece_of(memory, at)`.

        What `memory` holds before them may be changed.
        """

    def copy(self, source: Source, start: int, count: int, look: Callable[[memoryview], None] | None) -> None:
        """Take the `count` bytes at byte `start` of an input as the next ones, and show all of them to `look`."""


class Sink(Protocol):
    """Takes one output file."""

    def part(self, at: int, count: int) -> Part:
        """What takes the `count` bytes from byte `at` of the file on."""

    def finish(self) -> bool:
        """Come back when every byte of the file is where it belongs; False where the work was stopped before.

        The engine calls it once, before the first byte comes, in a thread of its own.
        """

    def record(self, seen: Seen, digest: Digest) -> None:
        """Hear what was seen of the file; called last, when it is finished and its inputs were checked and had not changed."""

    def close(self) -> None:
        """Let go of what is open, once the work was stopped and no thread is busy with the file any more."""


class Destination(Protocol):
    """Where output files go."""

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """Output files that are there already, by name: nothing is made for them. By default there are none."""
        return {}

    def rounds(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        """The files `names` that are to be made, in rounds: when one is asked for, the files of that before are recorded.

        By default there is one round.
        """
        return [names]

    def open(self, name: str, layout: Layout, stop: threading.Event) -> Sink:
        """What takes the file `name`, whose header is `layout.header`; `stop` is set when the work is to end early."""


def piece_of(memory: memoryview, at: int) -> memoryview:
    """The bytes for byte `at` of a file: they are as far from a page's start in memory as they are in the file."""
    return memory[at % PAGE :]


class Arrived:
    """How many bytes have come; the one who waits for more wakes when they are there, or when the work is stopped."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.count, self.wanted, self.changed = stop, 0, 0, threading.Condition()

    def add(self, count: int) -> None:
        """Account for some more bytes."""
        with self.changed:
            self.count += count
            if self.count >= self.wanted:  # to wake for less would take Python's lock from the workers
                self.changed.notify_all()

    def wait_for(self, count: int) -> bool:
        """Until `count` bytes have come; False when the work is being stopped."""
        with self.changed:
            self.wanted = count
            while self.count < count and not self.stop.is_set():
                self.changed.wait(0.2)
            return not self.stop.is_set()


class Memory(threading.local):
    """Memory for a thread to read into, which it has again at the next call; it begins with a page."""

    held = memoryview(b"")

    def of(self, size: int) -> memoryview:
        """That many bytes of it."""
        if len(self.held) < size:
            self.held = memoryview(mmap.mmap(-1, size + PAGE))
        return self.held[:size]


def pieces_of(source: Source, start: int, count: int, at: int, memory: Memory) -> Iterable[tuple[int, memoryview]]:
    """Some bytes of a source, read into `memory` piece by piece, as `Part.put` takes them for byte `at` and on.

    Each comes with the byte of the file that it is for.
    """
    for done in range(0, count, COPY_PIECE):
        size = min(COPY_PIECE, count - done)
        held = memory.of((at + done) % PAGE + size)
        source.read(start + done, size, piece_of(held, at + done))
        yield at + done, held
