"""Where the time of a thread goes, stage by stage.

A thread that wants to know begins a `Stopwatch`; whoever works for it says `lap("read", 4096)` when a stage ends, and
need not know whether anybody asks. A lap takes about a microsecond.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Spent:
    """What a stage took: seconds of the processor and of the clock, and the bytes that passed."""

    processor: float = 0.0
    wall: float = 0.0
    bytes: int = 0

    def add(self, other: Spent) -> None:
        self.processor += other.processor
        self.wall += other.wall
        self.bytes += other.bytes


class Stopwatch:
    """The stages of one thread. All its time since the last lap belongs to the stage that the next one names."""

    def __init__(self, thread: str) -> None:
        self.thread, self.stages = thread, dict[str, Spent]()
        self.processor, self.wall = time.thread_time(), time.perf_counter()

    def lap(self, stage: str, count: int) -> None:
        processor, wall = time.thread_time(), time.perf_counter()
        spent = self.stages.get(stage)
        if spent is None:
            spent = self.stages[stage] = Spent()
        spent.processor += processor - self.processor
        spent.wall += wall - self.wall
        spent.bytes += count
        self.processor, self.wall = processor, wall


class Running(threading.local):
    """The stopwatch of each thread that has one."""

    watch: Stopwatch | None = None


RUNNING = Running()


def begin(thread: str) -> Stopwatch:
    """Take this thread's time from now on, under this name."""
    RUNNING.watch = watch = Stopwatch(thread)
    return watch


@contextmanager
def timed(thread: str) -> Iterator[Stopwatch]:
    """Take this thread's time meanwhile."""
    try:
        yield begin(thread)
    finally:
        RUNNING.watch = None


def running() -> list[Stopwatch]:
    """The stopwatch of this thread, if it has one."""
    return [] if RUNNING.watch is None else [RUNNING.watch]


def lap(stage: str, count: int = 0) -> None:
    """A stage of this thread's work has ended, in which so many bytes have passed."""
    if (watch := RUNNING.watch) is not None:
        watch.lap(stage, count)


def together(watches: Iterable[Stopwatch]) -> dict[str, dict[str, Spent]]:
    """What was spent, by thread and stage; stopwatches of one name are one."""
    found: dict[str, dict[str, Spent]] = {}
    for watch in watches:
        stages = found.setdefault(watch.thread, {})
        for stage, spent in watch.stages.items():
            stages.setdefault(stage, Spent()).add(spent)
    return found
