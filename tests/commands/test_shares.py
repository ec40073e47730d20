"""Which of several workers a process is, as typed or as schedulers tell it; the examples of docs/distributed/ work."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import yaml  # type: ignore[import-untyped]
from paths import ROOT

from loratool.cli import run
from loratool.errors import UsageError
from loratool.merging import dealing
from loratool.options.sharing import Share

SCRIPTS = ROOT / "docs" / "distributed"


def slurm(task: int, least: int, step: int, count: int) -> dict[str, str]:
    """The variables of a task of an array."""
    values = {"ID": task, "MIN": least, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def ranked(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size)}


@pytest.mark.parametrize(
    ("word", "environ", "share"),
    [
        ("3/8", {}, (3, 8)),
        ("1/1", ranked(2, 4), (1, 1)),
        ("auto", slurm(0, 0, 1, 4), (1, 4)),
        ("auto", slurm(3, 0, 1, 4), (4, 4)),
        ("auto", slurm(1, 1, 1, 4), (1, 4)),
        ("auto", slurm(9, 3, 2, 5), (4, 5)),
        ("auto", ranked(0, 4), (1, 4)),
        ("auto", ranked(3, 4), (4, 4)),
        ("auto", slurm(2, 1, 1, 4) | ranked(0, 1), (2, 4)),
        ("auto/16", {"JOB_COMPLETION_INDEX": "0"}, (1, 16)),
        ("auto/16", {"JOB_COMPLETION_INDEX": "15"}, (16, 16)),
        ("auto", {"RANK": " 03\n", "WORLD_SIZE": "4"}, (4, 4)),
        ("auto", ranked(1, 4) | {"JOB_COMPLETION_INDEX": "2"}, (2, 4)),
        ("auto/4", ranked(1, 4) | {"JOB_COMPLETION_INDEX": "2"}, (3, 4)),
    ],
)
def test_a_share_is_what_the_word_or_the_scheduler_says(
    word: str, environ: dict[str, str], share: tuple[int, int]
) -> None:
    assert Share.of(word, environ) == Share(*share)


@pytest.mark.parametrize(
    ("word", "environ", "said"),
    [
        ("0/4", {}, "from 1 to N"),
        ("5/4", {}, "from 1 to N"),
        ("-1/4", {}, "from 1 to N"),
        ("1/0", {}, "from 1 to N"),
        ("half", {}, "must be I/N"),
        ("1/4/2", {}, "must be I/N"),
        ("٣/8", {}, "must be I/N"),
        ("auto", {}, "none of them is set"),
        ("auto", {"RANK": "0"}, "WORLD_SIZE is not set"),
        ("auto", ranked(4, 4), r"from 0 to WORLD_SIZE - 1 \(got RANK=4, WORLD_SIZE=4\)"),
        ("auto", {"RANK": "first", "WORLD_SIZE": "4"}, "must be a whole number"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        ("auto", slurm(7, 1, 1, 3), "evenly spaced"),
        ("auto", slurm(4, 1, 2, 3), "evenly spaced"),
        ("auto", slurm(1, 1, 1, 4) | ranked(0, 2), "both set"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "auto/N"),
        ("auto/4", {}, "not set"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "numbered from 0 to 3"),
        ("auto/0", {"JOB_COMPLETION_INDEX": "0"}, r"N must be at least 1 \(got 0\)"),
        ("auto/-4", {"JOB_COMPLETION_INDEX": "0"}, r"N must be at least 1 \(got -4\)"),
        ("auto/4", {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX must be a whole number"),
        ("auto", slurm(1, 1, 1, 0), "not one of 0"),
        ("auto", ranked(0, 0), "from 0 to WORLD_SIZE - 1"),
        ("auto", ranked(-1, 4), "from 0 to WORLD_SIZE - 1"),
        *(
            ("auto", {"RANK": rank, "WORLD_SIZE": "99"}, "RANK must be a whole")
            for rank in ("1_0", "+1", "١", "1.0", "")
        ),
        ("auto", {"RANK": "9" * 5000, "WORLD_SIZE": "4"}, "RANK must be a whole number"),
        ("1/999999999", {}, r"at most 100,000 workers \(got 999,999,999\)"),
        ("auto", ranked(0, 10**9), "at most 100,000 workers"),
        ("auto", slurm(0, 0, 1, 10**9), "at most 100,000 workers"),
    ],
)
def test_what_is_no_share_is_refused_with_the_reason(word: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Share.of(word, environ)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and an adapter, of several parts."""
    monkeypatch.setattr(dealing, "SMALLEST", 9000)
    monkeypatch.chdir(tmp_path)
    faults.make_base(Path("base"), 2, 64)
    faults.make_adapter(Path("adapter"), 2, 64)
    return tmp_path


def as_called(home: Path, shell: list[str], environ: dict[str, str]) -> list[list[str]]:
    """The commands of loratool that a script runs: a stand-in of that name writes down what it is called with."""
    log = home / "called"
    stand_in_for(home, "loratool")
    log.write_text("")
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(shell, check=True, cwd=home, env={"PATH": path, **environ}, timeout=30)
    return [json.loads(line) for line in log.read_text().splitlines()]


def stand_in_for(home: Path, name: str, says: str = "") -> None:
    """A program that writes down what it is called with, and says something."""
    stand_in = home / "bin" / name
    stand_in.parent.mkdir(exist_ok=True)
    code = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[3:]) + chr(10)); print(sys.argv[2])"
    words = shlex.join([sys.executable, "-S", "-c", code, str(home / "called"), says])
    stand_in.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    stand_in.chmod(0o755)


def with_environment(words: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command in this process."""
    with monkeypatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return run(words)


def test_the_example_for_slurm_merges(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its array has sixteen tasks; each is run with the variables that Slurm sets."""
    script = SCRIPTS / "slurm.sh"
    assert "--array=1-16" in script.read_text()
    (words,) = as_called(home, ["bash", str(script), "base", "adapter", "merged"], slurm(1, 1, 1, 16))
    for task in range(1, 17):
        assert with_environment([*words, "--device", "cpu"], slurm(task, 1, 1, 16), monkeypatch) == 0
    assert run(["merge", "base", "adapter", "-o", "merged", "--finish"]) == 0
    assert run(["verify", "merged", "--base", "base", "--adapter", "adapter"]) == 0


def test_the_first_commands_of_the_page_start_the_array_and_what_follows_it(home: Path) -> None:
    """The block of docs/distributed.md in a shell, with Slurm and loratool replaced: whatever it names is there, and the
    merge that is published and looked at is that of the array."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    block = page.partition("```console\n")[2].partition("```")[0]
    stand_in_for(home, "sbatch", "77")
    (home / "docs").symlink_to(ROOT / "docs")
    shell = "\n".join(line.removeprefix("$ ") for line in block.splitlines())
    array, finish, status = as_called(home, ["bash", "-euc", shell], {})
    name, *operands = array[1:]
    assert (array[0], (home / name).resolve()) == ("--parsable", (SCRIPTS / "slurm.sh").resolve())
    assert finish[:2] == ["--dependency=afterok:77", "--wrap"]
    base, adapter, out = operands
    merge = ["merge", base, adapter, "-o", out]
    assert shlex.split(finish[2]) == ["loratool", *merge, "--finish"]
    assert status == [*merge, "--status"]


def test_the_example_for_kubernetes_merges(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pod is run with its index, and the other Job publishes what they have made."""
    parts, finish = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    count = parts["spec"]["completions"]
    (worker,), (other,) = (each["spec"]["template"]["spec"]["containers"] for each in (parts, finish))
    for index in range(count):
        words = [home_of(word, home) for word in worker["command"][1:]]
        environ = {"JOB_COMPLETION_INDEX": str(index)}
        assert with_environment([*words, "--device", "cpu"], environ, monkeypatch) == 0
    (*_, words) = as_called(home, [*other["command"], *other["args"]], {})
    assert run([home_of(word, home) for word in words]) == 0
    assert run(["verify", "merged"]) == 0


def home_of(word: str, home: Path) -> str:
    return word.replace("/models", str(home))
