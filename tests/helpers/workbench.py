"""A base, an adapter and a place for the output, on which the real command line is run and watched.

Every refusal is held to the same contract: the exit code, one message on stderr that names what is
wrong, no traceback, no control characters, inputs untouched, and nothing left where OUT would be.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from malformed import ADAPTER, BASE, MERGED, MODEL, WEIGHT, Array, Content, put, write_adapter, write_base
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

import loratool
from loratool import cli
from loratool.cli import run
from loratool.files import staging

if TYPE_CHECKING:
    from loratool.files.journal import FinishedShard

LONGEST_MESSAGE = 6000  # characters: a screenful or two, whatever the input holds
LONGEST_WAIT = 15.0  # seconds until a command counts as hanging
LARGEST_COMPARED = 4 << 20  # bytes of an input that a snapshot keeps


class AlarmError(BaseException):
    """The time is up. No `Exception`, so that nothing swallows it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail the test when the block takes longer, even when it is blocked in a call."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except AlarmError:  # its traceback may end on no line at all, which pytest cannot show
        raise pytest.fail.Exception(f"still running after {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below `root`: kind and mode, and the bytes, the link's target, or size and time."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                small = status.st_size <= LARGEST_COMPARED
                content = path.read_bytes() if small else (status.st_size, status.st_mtime_ns)
            found[os.path.relpath(path, root)] = (status.st_mode, content)
    return found


def is_clean(text: str) -> bool:
    """Whether `text` may go to a terminal: nothing in it moves the cursor, colours or reorders."""
    return all(c == "\n" or c.isprintable() for c in text)


class Workbench:
    """A sound base of three tensors and a sound adapter on one of them, for a test to spoil."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.inputs, self.outputs = root / "in", root / "out"
        self.base, self.adapter, self.out = self.inputs / "base", self.inputs / "adapter", self.outputs / "merged"
        self.outputs.mkdir(parents=True)
        write_base(self.base)
        write_adapter(self.adapter)
        self.capsys = capsys

    def run(self, *words: str | Path) -> Outcome:
        """The outcome of `loratool WORDS`, in this process."""
        self.capsys.readouterr()
        started = time.monotonic()
        with within(LONGEST_WAIT):
            code = run([os.fspath(word) for word in words])
        out, err = self.capsys.readouterr()
        return Outcome(code, out, err, time.monotonic() - started)

    def refuses(self, *words: str | Path, told: Sequence[str], code: int = 3) -> Outcome:
        """Run a command that must fail with `code` and a message with all of `told`, and leave no trace."""
        before = snapshot(self.inputs), snapshot(self.outputs)
        outcome = self.run(*words)
        check_refusal(outcome, told, code)
        assert (snapshot(self.inputs), snapshot(self.outputs)) == before
        return outcome

    def refuses_to_merge(self, *told: str, code: int = 3, options: Sequence[str] = ()) -> Outcome:
        return self.refuses("merge", self.base, self.adapter, "-o", self.out, *options, told=told, code=code)

    def refuses_to_inspect(self, path: Path, *told: str, code: int = 3) -> Outcome:
        return self.refuses("inspect", path, told=told, code=code)

    def refuses_weights(self, content: Content, *told: str, reference_accepts: bool = False) -> None:
        """Nobody takes a weights file with `content`: not as base, not as adapter, not to look at.

        The reference parser's verdict is asked for too.
        """
        sound = (self.base / MODEL).read_bytes()
        put(self.base / MODEL, content)
        self.refuses_to_merge(MODEL, *told)
        self.refuses_to_inspect(self.base, MODEL, *told)
        self.refuses("merge", self.base / MODEL, self.adapter, "-o", self.out, told=[MODEL, *told])
        assert reference_takes(self.base / MODEL) == reference_accepts
        put(self.base / MODEL, sound)
        put(self.adapter / ADAPTER, content)
        self.refuses_to_merge(ADAPTER, *told)
        self.refuses_to_inspect(self.adapter, ADAPTER, *told)

    def merges(self, *options: str | Path) -> tuple[dict[str, Array], Any]:
        """Run a merge that must work; the tensors of its output as the reference reads them, and its report."""
        before = snapshot(self.inputs)
        outcome = self.run("merge", self.base, self.adapter, "-o", self.out, "--json", *options)
        assert (outcome.code, outcome.err) == (0, ""), outcome
        assert is_clean(outcome.out), ascii(outcome.out)
        assert snapshot(self.inputs) == before
        assert os.listdir(self.outputs) == [self.out.name]
        return tensors_of(self.out), json.loads(outcome.out)


def check_refusal(outcome: Outcome, told: Sequence[str], code: int = 3) -> None:
    """One clear message, and the contract's exit code."""
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("Error: "), outcome.err
    assert outcome.err.count("Error:") == 1, outcome.err
    assert outcome.out == "", outcome.out
    assert "Traceback" not in outcome.err, outcome.err
    assert "a bug in loratool" not in outcome.err, outcome.err
    assert is_clean(outcome.err), ascii(outcome.err)
    assert len(outcome.err) < LONGEST_MESSAGE, len(outcome.err)
    check_hint(outcome.err.splitlines()[-1].removeprefix("hint: "))
    for part in told:
        assert part in outcome.err, f"{part!r} is not told: {outcome.err}"


def check_hint(hint: str) -> None:
    """The last line of an error is a command: one of ours, with options that it has, or one that makes a folder."""
    program, name, *words = shlex.split(hint)
    if (program, name) == ("mkdir", "-p"):
        return
    assert program == "loratool", hint
    if name == "--help":
        return
    known = {flag for parameter in cli.command(name).params for flag in (*parameter.opts, *parameter.secondary_opts)}
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(flags) <= {*known, "--help"}, hint


def reference_takes(path: Path) -> bool:
    """Whether the safetensors package opens the file. (It blocks on a pipe: give it none.)"""
    try:
        with safe_open(path, "numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def tensors_of(folder: Path) -> dict[str, Array]:
    """All tensors of a model folder in float64, read by the safetensors package, which wants UTF-8 for paths."""
    found: dict[str, Array] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.update((name, tensor.double().numpy()) for name, tensor in load(path.read_bytes()).items())
    return found


def check_is_merged(tensors: Mapping[str, Array]) -> None:
    """The first weight is W + 2·BA and the other tensors of the base are what they were, bit for bit."""
    assert np.array_equal(tensors[WEIGHT], MERGED)
    for name, stored in BASE.items():
        if name != WEIGHT:
            assert tensors[name].astype("<f4").tobytes() == stored.raw


def command(*words: str | Path) -> list[str]:
    """`loratool WORDS` for a process of its own."""
    return [sys.executable, "-m", "loratool", *(os.fspath(word) for word in words)]


def bound_by_permissions(words: Sequence[str]) -> list[str]:
    """The same command as a process that file modes hold for, though a root user runs the tests."""
    if os.geteuid() != 0:
        return list(words)
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv cannot give up its right to pass over file modes")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *words]


def run_apart(words: Sequence[str], **options: Any) -> Outcome:
    """The outcome of a command in a process of its own."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
    started = time.monotonic()
    done = subprocess.run(words, check=False, text=True, errors="surrogateescape", **settings)
    return Outcome(done.returncode, done.stdout or "", done.stderr or "", time.monotonic() - started)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """`root` and everything below it: kind, inode, time of the last change, and the bytes or the link's target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        link = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, content, link)
    return found


def interrupted(
    base: Path, adapters: Path | Sequence[Path], out: Path, finished: int = 1, **settings: Any
) -> list[str]:
    """A merge that is interrupted when so many of its files are finished; the names of those that are."""
    names: list[str] = []

    class Interrupting(staging.Stage):
        def record(self, shard: FinishedShard) -> None:
            if len(names) >= finished:  # of several that end at once
                raise KeyboardInterrupt
            super().record(shard)
            names.append(shard.name)
            if len(names) >= finished:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "Stage", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            loratool.merge(base, adapters, out, workers=1, device="cpu", **settings)
    return sorted(names)


def each(cases: Mapping[str, object]) -> pytest.MarkDecorator:
    """A test for each case, by its name."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])
