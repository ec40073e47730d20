"""`Sink`: takes the bytes of one output file as they are made, and knows nothing of how they are made.

The engine puts parts that together are every byte after the header, in any order of threads; it begins them in the
file's order, so that a sink may hash or send the file from its start while later parts are being made.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loratool.files.journal import FinishedShard, Seen
    from loratool.files.safefile import Layout
    from loratool.files.source import Source

PAGE = max(4096, mmap.PAGESIZE)  # bytes: what a direct write begins and ends at, in the file and in memory


class Sink(Protocol):
    """Takes one output file. Any thread may put any part; all parts before one have been put or are on their way."""

    def put(self, memory: memoryview, at: int) -> None:
        """Take the bytes from `at` on, which are `part_of(memory, at)`; what `memory` holds before them may be changed."""
        ...

    def copy(self, source: Source, start: int, count: int, at: int) -> None:
        """Take `count` bytes that are found at byte `start` of an input, for byte `at` of the file."""
        ...

    def finish(self) -> bool:
        """Come back when every byte of the file is where it belongs; False where the work was stopped before.

        The engine calls it once, before the first byte comes, in a thread of its own.
        """
        ...

    def record(self, seen: Seen) -> None:
        """Hear what was seen of the file; called last, when it is finished and its inputs were found unchanged."""
        ...

    def close(self) -> None:
        """Let go of what is open, once the work was stopped and no thread is busy with the file any more."""
        ...


class Destination(Protocol):
    """Where output files go."""

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        """Output files that are there already, by name: nothing is made for them."""
        ...

    def rounds(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        """The files `names` that are to be made, in rounds: when one is asked for, the files of that before are recorded."""
        ...

    def open(self, name: str, layout: Layout, stop: threading.Event) -> Sink:
        """What takes the file `name`, whose header is `layout.header`; `stop` is set when the work is to end early."""
        ...


def part_of(memory: memoryview, at: int) -> memoryview:
    """The bytes for byte `at` of a file: they are as far from a page's start in memory as they are in the file."""
    return memory[at % PAGE :]


class Arrived:
    """How many bytes have come this far; whoever waits for more wakes when they come, or when the work is stopped."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self.count, self.changed = stop, 0, threading.Condition()

    def add(self, count: int) -> None:
        """Account for some more bytes."""
        with self.changed:
            self.count += count
            self.changed.notify_all()

    def wait_for(self, count: int) -> bool:
        """Until `count` bytes have come; False when the work is being stopped."""
        with self.changed:
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
