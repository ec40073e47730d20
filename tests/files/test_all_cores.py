"""`on_all_cores`: every item is done once, by as many threads as there are cores, and an error ends all of them."""

from __future__ import annotations

import threading

import pytest

from loratool.files import process
from loratool.files.crew import Crew, in_threads
from loratool.files.process import on_all_cores


def test_what_comes_back_is_in_the_order_of_the_items() -> None:
    assert on_all_cores(lambda number: number**2, range(100)) == [number**2 for number in range(100)]
    assert on_all_cores(str, []) == []


def test_threads_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three items waits until three threads have begun; fewer threads would wait for ever."""
    monkeypatch.setattr(process, "cores", lambda: 3)
    together = threading.Barrier(3, timeout=30)

    def thread(_: int) -> threading.Thread:
        together.wait()
        return threading.current_thread()

    assert len({*on_all_cores(thread, range(3))}) == 3


@pytest.mark.parametrize("fails", [0, 5])
def test_an_error_is_raised_and_what_has_not_begun_by_then_is_not_done(
    fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "cores", lambda: 2)
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == fails:
            raise ValueError(f"item {number}")

    with pytest.raises(ValueError, match=f"item {fails}"):
        on_all_cores(work, range(1_000_000))
    assert len(begun) < 1_000_000
    assert not [each for each in threading.enumerate() if each.name == "loratool-work"]


def test_an_interrupt_of_the_caller_stops_its_threads_which_have_ended_when_it_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main thread, which signals interrupt, waits; the others look at `stop`."""
    stop, all_there, ended = threading.Event(), threading.Barrier(3, timeout=30), []
    join = Crew.join

    def work(number: int) -> None:
        all_there.wait()
        assert stop.wait(30)
        ended.append(number)

    def interrupted(crew: Crew) -> None:
        monkeypatch.setattr(Crew, "join", join)
        all_there.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(Crew, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_threads(work, 2, stop)
    assert sorted(ended) == [0, 1]


def test_a_wait_that_was_interrupted_when_its_thread_had_ended_can_be_repeated() -> None:
    """Such an interrupt leaves the lock of the thread with the one who waited, and the next wait does without it."""
    crew = Crew(lambda: None)
    crew.start(lambda: None)
    crew.join()
    assert crew.ends[0].lock.acquire(blocking=False)
    crew.join()
    assert crew.has_ended(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_thread_that_never_began_is_not_waited_for(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt comes before it begins, or the system has no more threads."""

    def start(_: threading.Thread) -> None:
        raise error

    crew = Crew(lambda: None)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(error):
        crew.start(lambda: None)
    crew.join()
    assert crew.has_ended(0)


def test_a_thread_that_began_before_its_start_was_interrupted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, ended, start = threading.Event(), [], threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    def work() -> None:
        assert may_end.wait(30)
        ended.append(True)

    crew = Crew(may_end.set)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        crew.start(work)
    assert not crew.has_ended(0.01)
    may_end.set()
    crew.join()
    assert ended == [True]
