"""Threads that work on one thing: an error of any of them ends all, and an interrupt comes through whoever waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Crew:
    """Threads that were started together, or by each other."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """`stop` asks all of them to end."""
        self.stop = stop
        self.failures: list[BaseException] = []
        # One a thread, which holds it for as long as it runs. Neither Thread.join nor an Event stands an interrupt at every
        # moment of a wait: the first may take a running thread for an ended one (before CPython 3.13), the other may keep
        # its inner lock for ever.
        self.ends: list[threading.Lock] = []

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        """One more thread."""
        end = threading.Lock()
        end.acquire()

        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                self.failures.append(error)
                self.stop()
            finally:
                end.release()

        self.ends.append(end)
        try:
            threading.Thread(target=guarded, name=f"loratool-{target.__name__}", daemon=True).start()
        except RuntimeError:  # no more threads are to be had
            end.release()
            raise

    def join(self) -> None:
        """Wait for all threads, those too that are started meanwhile; signals come through."""
        at = 0
        while at < len(self.ends):
            if self.ends[at].acquire(timeout=0.1):
                self.ends[at].release()  # for `has_ended`, which waits for it too
                at += 1

    def has_ended(self, seconds: float) -> bool:
        """Whether all threads, those too that are started meanwhile, end within some seconds."""
        until, ended = time.monotonic() + seconds, True
        for end in self.ends:
            ended &= end.acquire(timeout=max(0.0, until - time.monotonic()))
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
