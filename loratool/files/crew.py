"""Threads that work on one thing: an error of any of them ends all, and an interrupt comes through whoever waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class End:
    """Whether a thread has ended, and a way to wait for it that an interrupt leaves as it was at every moment.

    Neither Thread.join nor an Event does: the first may take a running thread for an ended one (before CPython 3.13), the
    other may keep its inner lock for ever. A lock may be left with whoever waited for it; then `came` tells.
    """

    def __init__(self) -> None:
        self.came = False
        self.lock = threading.Lock()
        self.lock.acquire()  # for as long as the thread runs

    def come(self) -> None:
        """Say that the thread has ended, or will not begin."""
        self.came = True
        self.lock.release()

    def has_come(self, seconds: float) -> bool:
        """Whether the thread ends within some seconds."""
        if not self.came and self.lock.acquire(timeout=seconds):
            self.lock.release()
        return self.came


class Crew:
    """Threads that were started together, or by each other."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """`stop` asks all of them to end."""
        self.stop = stop
        self.failures: list[BaseException] = []
        self.ends: list[End] = []

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        """One more thread."""
        end = End()

        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                self.failures.append(error)
                self.stop()
            finally:
                end.come()

        thread = threading.Thread(target=guarded, name=f"loratool-{target.__name__}", daemon=True)
        try:
            self.ends.append(end)
            thread.start()
        except BaseException:
            # no more threads are to be had, or an interrupt came before this one began; else it is there, or has ended
            if thread not in threading.enumerate() and not end.came:
                end.come()
            raise

    def join(self) -> None:
        """Wait for all threads, those too that are started meanwhile; signals come through."""
        at = 0
        while at < len(self.ends):
            at += self.ends[at].has_come(0.1)

    def has_ended(self, seconds: float) -> bool:
        """Whether all threads, those too that are started meanwhile, end within some seconds."""
        until, ended = time.monotonic() + seconds, True
        for end in self.ends:
            ended &= end.has_come(max(0.0, until - time.monotonic()))
        return ended


def in_threads(work: Callable[[int], None], count: int, stop: threading.Event) -> None:
    """Call `work` with each number below `count`, in a thread for each, until all have ended.

    The first error, or an interrupt, sets `stop`, which all are to look at; it is raised once they have ended. A pool of
    `concurrent.futures` does the same, but imports `logging`, which takes longer than many a comparison.
    """
    crew = Crew(stop.set)
    try:
        for number in range(count):
            crew.start(work, number)
        crew.join()
    finally:
        stop.set()
        crew.join()
    if crew.failures:
        raise crew.failures[0]
