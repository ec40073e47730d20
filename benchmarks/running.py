"""Contenders as whole processes: from the start of the process to the end of the `sync` behind it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


def cost_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a report tells of time and memory; before 0.2.0 these fields stood in the report itself."""
    cost: dict[str, Any] = report.get("cost", report)
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


@dataclass(frozen=True)
class Contender:
    """A way to make the output folder, as a command line."""

    name: str
    command: Callable[[Path, Path], list[str]]  # (folder with base and adapter, output) → words


COPY = Contender("cp -r", lambda model, out: ["cp", "-r", str(model / "base"), str(out)])


def merge_contender(device: str) -> Contender:
    def command(model: Path, out: Path) -> list[str]:
        words = [sys.executable, "-m", "loratool", "merge", str(model / "base"), str(model / "adapter")]
        return [*words, "-o", str(out), "--device", device, "-q", "--json"]

    return Contender(f"loratool {device}", command)


def peft_contender(device: str) -> Contender:
    def command(model: Path, out: Path) -> list[str]:
        words = [sys.executable, str(HERE / "peft_merge.py"), str(model / "base"), str(model / "adapter")]
        return [*words, str(out), device]

    return Contender(f"PEFT {device}", command)


def environment() -> dict[str, str]:
    """Loratool is this source tree's, and nobody asks the network."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def run(words: Sequence[str]) -> tuple[Run, str, str]:
    """Run a process to its end, then `sync`. Also what it printed on stdout and stderr."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment())
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


def contend(contender: Contender, model: Path, warm: bool) -> Run:
    """One timed run, from a quiet disk with the base in or out of the page cache, and no output left behind."""
    out = model / "out"
    os.sync()
    set_cache(model, warm)
    try:
        measured, said, _ = run(contender.command(model, out))
        expected = sum(path.stat().st_size for path in (model / "base").glob("*.safetensors"))
        found = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        if abs(found - expected) > 1_000_000:  # PEFT's header has other padding, and it may cut other files
            raise SystemExit(f"{contender.name} left {found} bytes of weights where {expected} were expected")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if said.lstrip().startswith("{"):
        measured.report = json.loads(said)
        measured.peak_memory = max(measured.peak_memory, cost_of(measured.report)["peak_memory"])
    return measured


def set_cache(model: Path, warm: bool) -> None:
    """Read the inputs once, or have the kernel forget them."""
    buffer = bytearray(4 << 20)
    for path in sorted(model.glob("*/*.safetensors")):
        with open(path, "rb", buffering=0) as stream:
            if warm:
                while stream.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_model(kind: str, folder: Path) -> None:
    """Base and adapter by `shapes.py`, in a process of its own so that this one stays small."""
    run([sys.executable, str(HERE / "shapes.py"), kind, str(folder)])


def run_quickly(words: Sequence[str]) -> tuple[float, str]:
    """Wall time of a Python process, without any sync, and what it said on stderr."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment(), check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])} failed:\n{done.stderr[-3000:]}")
    return taken, done.stderr
