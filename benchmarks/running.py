"""Contenders as whole processes: from the start of the process to the end of the `sync` behind it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


def cost_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a report tells of time and memory, or the first of those that `inspect` prints; before 0.2.0 the report itself."""
    first: dict[str, Any] = report.get("results", [report])[0]
    cost: dict[str, Any] = first.get("cost", first)
    return cost


@dataclass
class Run:
    """One process from its start to the end of the `sync` behind it. Times in seconds, sizes in bytes."""

    wall: float
    sync: float  # of `wall`: spent in the last sync
    processor: float  # user and system time of the process
    peak_memory: int  # resident; 0 where it is too small to be told apart from this process's own
    report: dict[str, Any] = field(default_factory=dict)  # what loratool says in JSON

    @property
    def startup(self) -> float:
        return float(cost_of(self.report).get("startup_seconds", 0.0))

    @property
    def work(self) -> float:
        """Seconds that loratool reports, less its start-up, and those of the sync; of other programs all."""
        return float(cost_of(self.report).get("seconds", self.wall - self.sync)) - self.startup + self.sync


@dataclass(frozen=True)
class Contender:
    """A way to make outputs from a model's base and adapters, as processes that run one after the other."""

    name: str
    commands: Callable[[Path, Path], list[list[str]]]  # (folder of the model, folder for outputs) → words of each
    outputs: int = 1  # models that it makes; 0 where what it makes is no model
    program: str = ""  # contenders of the same one start alike; "" where starting costs nothing
    tree: Path = REPOSITORY  # source of the loratool that runs


def environment(tree: Path = REPOSITORY) -> dict[str, str]:
    """Loratool is that of a source tree, compiled once as an installed one is, and nobody asks the network."""
    paths = [str(tree), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def run(words: Sequence[str], tree: Path = REPOSITORY) -> tuple[Run, str, str]:
    """Run a process to its end, then `sync`. Also what it printed on stdout and stderr.

    It runs in the source tree, for `python -m` takes a package of the current folder before any other.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        paths, silent = environment(tree), subprocess.DEVNULL
        process = subprocess.Popen(words, stdout=out, stderr=err, stdin=silent, env=paths, cwd=tree)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:  # interrupted: nothing may write on while the folder is removed
                process.kill()
                process.wait()
        ended = time.perf_counter()
        os.sync()
        synced = time.perf_counter()
        out.seek(0)
        err.seek(0)
        said, complained = out.read(), err.read()
    if process.returncode:
        name = " ".join(Path(word).name for word in words[:4])
        raise SystemExit(f"{name} … failed with exit code {process.returncode}:\n{complained[-3000:]}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child inherits it as its least
    peak = usage.ru_maxrss * 1024 if usage.ru_maxrss > own else 0
    measured = Run(synced - started, synced - ended, usage.ru_utime + usage.ru_stime, peak)
    return measured, said, complained


def loratool_run(words: Sequence[str], tree: Path = REPOSITORY) -> Run:
    """One process, with the report where it prints one as JSON."""
    measured, said, _ = run(words, tree)
    if said.lstrip().startswith("{"):
        measured.report = json.loads(said)
        measured.peak_memory = max(measured.peak_memory, cost_of(measured.report)["peak_memory"])
    return measured


def contend(contender: Contender, model: Path, out: Path, weights: int) -> list[Run]:
    """The contender's processes; each output in the new folder `out` has `weights` bytes of weights."""
    out.mkdir()
    os.sync()
    runs = [loratool_run(words, contender.tree) for words in contender.commands(model, out)]
    found = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    expected = contender.outputs * weights
    if (
        contender.outputs and abs(found - expected) > 1_000_000 * contender.outputs
    ):  # headers, and PEFT may cut other files
        raise SystemExit(f"{contender.name} left {found} bytes of weights where {expected} were expected")
    return runs


def set_cache(model: Path, warm: bool, files: str = "*/*.safetensors") -> None:
    """Read the inputs, or those files of the model's folder, once, or have the kernel forget them."""
    buffer = bytearray(4 << 20)
    for path in sorted(model.glob(files)):
        with open(path, "rb", buffering=0) as stream:
            if warm:
                while stream.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def apart(function: Callable[P, T], *words: P.args, **named: P.kwargs) -> T:
    """What the function returns, from a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *words, **named).result()


@contextmanager
def scratch(where: Path | None, name: str) -> Iterator[Path]:
    """A folder that is gone afterwards, however this ends, unless by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix=f"loratool-{name}-", dir=where)).absolute()
    try:
        yield folder
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # removing takes a moment, and must not be broken off
        shutil.rmtree(folder, ignore_errors=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run_quickly(words: Sequence[str]) -> tuple[float, str]:
    """Wall time of a Python process, without any sync, and what it said on stderr."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment(), check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])} failed:\n{done.stderr[-3000:]}")
    return taken, done.stderr


def say(text: str) -> None:
    """Progress; results go to stdout."""
    print(text, file=sys.stderr, flush=True)
