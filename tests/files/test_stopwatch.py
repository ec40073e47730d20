"""Where time goes: laps by made-up clocks, and the bytes of a merge that are known beforehand."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import faults

import loratool
from loratool import cli
from loratool.files import stopwatch
from loratool.files.stopwatch import Spent, Stopwatch, lap, together

if TYPE_CHECKING:
    import pytest


def test_all_time_since_the_last_lap_belongs_to_the_stage_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, wall = iter([1.0, 1.5, 2.0, 4.0]), iter([10.0, 11.0, 13.0, 20.0])
    monkeypatch.setattr(time, "thread_time", lambda: next(processor))
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    watch = Stopwatch("x")
    for stage, count in (("read", 5), ("write", 0), ("read", 7)):
        watch.lap(stage, count)
    assert watch.stages == {"read": Spent(2.5, 8.0, 12), "write": Spent(0.5, 2.0, 0)}


def test_stopwatches_of_one_name_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    watches = [Stopwatch(name) for name in ("a", "b", "a")]
    for number, watch in enumerate(watches):
        watch.lap("read", 10**number)
    assert {name: stages["read"].bytes for name, stages in together(watches).items()} == {"a": 101, "b": 10}


def test_a_thread_times_itself_alone() -> None:
    with stopwatch.timed("this one") as watch:
        other = threading.Thread(target=lap, args=("read", 3))
        other.start()
        other.join()
        assert watch.stages == {}
        lap("read", 4)
        assert watch.stages["read"].bytes == 4
    lap("read", 5)
    assert watch.stages["read"].bytes == 4


def test_a_merge_accounts_for_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the tensors: each is read once, hashed once and written once. `-vv` shows it apart from the report."""
    base, adapter = faults.make_base(tmp_path / "base", 2, 32), faults.make_adapter(tmp_path / "adapter", 2, 32)
    report = loratool.merge(base, adapter, tmp_path / "out", device="cpu", workers=2)
    tensors = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        content = path.read_bytes()
        tensors += len(content) - 8 - int.from_bytes(content[:8], "little")
    stages = report.profile.stages
    assert {stage: stages[stage].bytes for stage in ("read", "digest", "write")} == dict.fromkeys(
        ("read", "digest", "write"), tensors
    )
    assert {"main", "torch", "files", "worker 0", "worker 1"} == set(report.profile.threads)
    capsys.readouterr()
    words = ["merge", str(base), str(adapter), "--device", "cpu", "--json"]
    assert cli.run([*words, "-o", str(tmp_path / "two"), "-vv"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["profile"]["threads"]["worker 0"]["digest"]["bytes"] > 0
    assert {"all", "main", "worker"} <= {line.split()[0] for line in shown.err.splitlines() if line.strip()}
    assert cli.run([*words, "-o", str(tmp_path / "one"), "-v"]) == 0
    assert "worker 0" not in capsys.readouterr().err


def test_workers_of_a_merge_in_parts_account_for_every_byte_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shows its own: `-vv` as a table apart from the report, and `--json` among the rest."""
    base, adapter = faults.make_base(tmp_path / "base", 2, 32), faults.make_adapter(tmp_path / "adapter", 2, 32)
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--device", "cpu", "--json", "-vv"]
    counts: Counter[str] = Counter()
    for part in ("1/2", "2/2"):
        assert cli.run([*words, "--part", part]) == 0
        shown = capsys.readouterr()
        told = json.loads(shown.out)
        assert told["workers"] > 0
        assert {"all", "main", "worker"} <= {line.split()[0] for line in shown.err.splitlines() if line.strip()}
        for stages in told["profile"]["threads"].values():
            counts.update({stage: spent["bytes"] for stage, spent in stages.items()})
    loratool.finish_merge(base, adapter, tmp_path / "out", device="cpu")
    files = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    tensors = sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files)
    assert {stage: counts[stage] for stage in ("read", "digest", "write")} == dict.fromkeys(
        ("read", "digest", "write"), tensors
    )
