"""The threads of a merge share its tasks: whichever thread takes one, it is done, by a thread that may compute."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faults
import pytest

import loratool
from loratool.merging import engine, tasks
from loratool.merging.engine import Engine
from loratool.merging.resources import Resources, choose_resources
from loratool.merging.tasks import Output, Task


@pytest.mark.parametrize("shards", [1, 12])
@pytest.mark.parametrize("first", [0.0, 0.1])
def test_what_a_thread_takes_and_may_not_compute_is_computed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, first: float
) -> None:
    """The one thread that may compute comes `first` seconds after the others, who learn late that they may not.

    Twelve files are more than are open at a time, so some wait for those whose tasks were returned.
    """
    work, resources, choose = Engine.work, Engine.resources, choose_resources

    def late(self: Engine, number: int) -> None:
        time.sleep(0.0 if number else first)
        work(self, number)

    def slow(self: Engine) -> Resources:
        if self.chosen is None:
            time.sleep(0.3)
        return resources(self)

    monkeypatch.setattr(Engine, "work", late)
    monkeypatch.setattr(Engine, "resources", slow)
    monkeypatch.setattr(engine, "most_workers", lambda: 5)
    monkeypatch.setattr(engine, "choose_resources", lambda *given: dataclasses.replace(choose(*given), workers=1))
    base = faults.make_base(tmp_path / "base", shards, 32)
    adapter = faults.make_adapter(tmp_path / "adapter", shards, 32)
    found: list[Any] = []
    merging = threading.Thread(
        target=lambda: found.append(loratool.merge(base, adapter, tmp_path / "late", device="cpu")), daemon=True
    )
    merging.start()
    merging.join(60)
    assert found, "the merge waits for ever"
    monkeypatch.undo()
    loratool.merge(base, adapter, tmp_path / "plain", device="cpu")
    assert faults.picture(tmp_path / "late") == faults.picture(tmp_path / "plain")


@pytest.mark.parametrize("ready", [True, False])
def test_copies_come_first_until_something_can_compute_and_then_both_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    """So that disks and processors are busy at the same time; which comes when is nothing that the bytes depend on."""
    kinds: list[str] = []
    tasks_on = tasks.tasks_on

    def seen(outputs: Sequence[Output], _ready: Callable[[], bool]) -> Iterator[tuple[Task, ...]]:
        for some in tasks_on(outputs, lambda: ready):
            kinds.append(type(some[0]).__name__)
            yield some

    monkeypatch.setattr(engine, "tasks_on", seen)
    monkeypatch.setattr(tasks, "RUN", 1)  # each tensor is a task
    base, adapter = faults.make_base(tmp_path / "base", 1, 32), faults.make_adapter(tmp_path / "adapter", 1, 32)
    loratool.merge(base, adapter, tmp_path / "out", device="cpu", workers=1)
    copies, computed = kinds.count("Copy"), kinds.count("Compute")
    assert copies > 1
    assert computed > 1
    in_turns = ["Copy", "Compute"] * min(copies, computed)
    assert (
        kinds[: len(in_turns)] == (in_turns if ready else ["Copy"] * copies + ["Compute"] * computed)[: len(in_turns)]
    )


def test_a_disk_is_asked_for_the_bytes_of_a_task_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes of the tensors of a base, so that threads that compute need not wait for them."""
    base, adapter = faults.make_base(tmp_path / "base", 1, 32), faults.make_adapter(tmp_path / "adapter", 1, 32)
    file = next(base.glob("*.safetensors"))
    begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    asked, early = set[int](), list[int]()
    advise, read = os.posix_fadvise, os.preadv

    def advising(descriptor: int, start: int, count: int, advice: int) -> None:
        asked.update(range(start, min(start + count, file.stat().st_size)))
        advise(descriptor, start, count, advice)

    def reading(descriptor: int, buffers: Sequence[memoryview], at: int, *more: Any) -> int:
        if os.path.samestat(os.fstat(descriptor), file.stat()) and asked:
            early.extend(set(range(max(at, begin), at + len(buffers[0]))) - asked)
        return read(descriptor, buffers, at, *more)

    monkeypatch.setattr(os, "posix_fadvise", advising)
    monkeypatch.setattr(os, "preadv", reading)
    loratool.merge(base, adapter, tmp_path / "out", device="cpu", workers=1)
    assert asked >= set(range(begin, file.stat().st_size))
    assert not early
