"""Workers and finishers of merges in parts are killed at any moment; whoever is started again makes the right output."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import faults
import pytest

import loratool
from loratool import cli
from loratool.files import digests
from loratool.merging import dealing

ROUNDS = 50
SHARDS, HIDDEN = 4, 256
LONGEST = 0.25  # seconds that a worker takes, about


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operands of a merge of about fifty parts, and its output by one process, in `local`."""
    monkeypatch.setattr(digests, "CHUNK", 40_000)
    monkeypatch.setattr(dealing, "SMALLEST", 60_000)
    base = faults.make_base(tmp_path / "base", SHARDS, HIDDEN)
    adapter = faults.make_adapter(tmp_path / "adapter", SHARDS, HIDDEN)
    loratool.merge(base, adapter, tmp_path / "local", device="cpu")
    (tmp_path / "out").mkdir()
    return ["merge", str(base), str(adapter), "-o", str(tmp_path / "out" / "merged"), "--device", "cpu", "-q"]


def started(words: Sequence[str]) -> int:
    """The id of a process that does a command."""
    return faults.fork(partial(quit_with, words))


def quit_with(words: Sequence[str]) -> None:
    os._exit(cli.run(list(words)))


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "loratool.json"
    }


def killed_some(commands: Sequence[Sequence[str]], chance: random.Random) -> list[int]:
    """Start processes at the same time, and kill most of them at some moment; the exit codes."""
    processes = [started(words) for words in commands]
    for process in processes:
        time.sleep(chance.uniform(0, LONGEST / len(processes)))
        if chance.random() < 0.7:
            os.kill(process, signal.SIGKILL)  # one that has ended waits for `ended`, so its id is nobody else's
    return [ended(process) for process in processes]


def test_workers_that_are_killed_at_any_moment(inputs: list[str], tmp_path: Path) -> None:
    """Waves of workers of changing number, most of them killed, then finishers, most of them killed too."""
    wanted, root = content(tmp_path / "local"), tmp_path / "out"
    killed = 0
    for number in range(ROUNDS):
        chance = random.Random(number)
        for _ in range(chance.randint(1, 3)):
            count = chance.choice([1, 2, 3, 7])
            some = chance.sample(range(1, count + 1), min(count, 3))
            codes = killed_some([[*inputs, "--part", f"{each}/{count}"] for each in some], chance)
            killed += codes.count(-signal.SIGKILL)
            assert {*codes} <= {0, -signal.SIGKILL}, f"round {number}"
            assert os.listdir(root) in ([], ["merged.partial"]), f"round {number}"
        assert ended(started([*inputs, "--part", "1/1"])) == 0
        codes = killed_some([[*inputs, "--finish"]] * chance.randint(1, 2), chance)
        assert {*codes} <= {0, 2, -signal.SIGKILL}, f"round {number}"
        if (root / "merged").exists():
            assert content(root / "merged") == wanted, f"round {number}"
        assert ended(started([*inputs, "--finish"])) == 0, f"round {number}"
        assert os.listdir(root) == ["merged"], f"round {number}"
        assert content(root / "merged") == wanted, f"round {number}"
        shutil.rmtree(root / "merged")
    assert killed > ROUNDS // 2


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_finishers_that_begin_at_the_same_moment(inputs: list[str], tmp_path: Path, existing: bool) -> None:
    """Of three, one publishes; the others find the output complete, or that one at work."""
    wanted, out = content(tmp_path / "local"), tmp_path / "out" / "merged"
    more = ["--overwrite"] if existing else []
    for _ in range(20):
        if existing:
            loratool.merge(inputs[1], inputs[2], out, weights=[2], device="cpu", overwrite=True)
        assert ended(started([*inputs, *more, "--part", "1/1"])) == 0
        codes = [ended(process) for process in [started([*inputs, *more, "--finish"]) for _ in range(3)]]
        assert 0 in codes
        assert {*codes} <= {0, 2}, codes
        assert content(out) == wanted
        assert os.listdir(out.parent) == ["merged"]
        if not existing:
            shutil.rmtree(out)


def test_every_call_of_a_worker_and_of_a_finisher_may_be_its_last(inputs: list[str], tmp_path: Path) -> None:
    """Killed before each of its file calls in turn; the same command, run again, completes the output."""
    root, wanted = tmp_path / "out", content(tmp_path / "local")
    few = [*inputs, "--workers", "1"]
    undone: Callable[[], object] = partial(shutil.rmtree, root)
    for words in (["--part", "1/1"], ["--finish"]):
        shutil.copytree(root, tmp_path / "before", dirs_exist_ok=True)
        calls = [each for each in faults.merge([*few, *words], root, tmp_path).calls if each.name != "start"]
        for at in range(1, len(calls) + 1, max(1, len(calls) // 25)):
            undone()
            shutil.copytree(tmp_path / "before", root)
            outcome = faults.merge([*few, *words], root, tmp_path, faults.Fault("killed before", at))
            assert outcome.code in (-signal.SIGKILL, 0)
            assert {*os.listdir(root)} <= {"merged", "merged.partial"}
            for again in (["--part", "1/1"], ["--finish"]):
                assert ended(started([*inputs, *again])) == 0
            assert content(root / "merged") == wanted
            assert os.listdir(root) == ["merged"]
        undone()
        shutil.rmtree(tmp_path / "before")
        root.mkdir()
        if words == ["--part", "1/1"]:
            assert ended(started([*inputs, *words])) == 0
