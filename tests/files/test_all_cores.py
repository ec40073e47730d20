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
