"""Merges by 1, 2, 4 and 8 processes of this machine (`--part I/N`, `--finish`), next to what `plan --simulate` says.

    python benchmarks/distributed.py [--shape NAME] [--size BYTES] [--json FILE]

The rates that a simulation needs come from merges by one process, in which nothing is dealt: one that edits every layer
and one that edits a single layer give the rates of computing and of copying, and `verify` gives that of reading. All
processes share the cores and the disk of this machine, so each of N has an N-th of these rates. The simulation then
has to foresee how long N processes take together, and the check of `--finish` after them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from findings import Finding, at_least, at_most, multiple, rate, ratio, seconds
from rows import measure, parser_of
from running import environment, loratool_run, say
from shapes import SHAPES, make, make_adapter

import loratool
from loratool.merging.simulating import Rates, simulate

COUNTS = (1, 2, 4, 8)
TOLERANCE = 1.5  # between what is foreseen and what is measured, either way
FASTEST = 0.9  # N processes over one with the same cores


@dataclass(frozen=True)
class Known:
    """What one process does on this machine, in bytes a second; and how long it takes to start."""

    compute: float
    copy: float
    read: float
    startup: float  # seconds until torch is there
    plan: float  # seconds until headers are read
    alone: float  # seconds of the merge of the whole model by one process

    def shared(self, count: int) -> Rates:
        """What each of `count` processes can do, that run at the same time on the same cores and the same disk."""
        startup = self.startup * max(1.0, count / (os.cpu_count() or 1))
        return Rates(self.read, self.read, self.compute / count, self.copy / count, startup)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "loratool", *map(str, words)]


def merge(home: Path, adapter: str, *more: str | Path) -> list[str]:
    return command("merge", home / "base", home / adapter, "-o", home / "out", "--device", "cpu", "--json", *more)


def timed(words: Sequence[str]) -> float:
    """Seconds of a process by the clock, its sync included."""
    return loratool_run(words).wall


def remove(home: Path) -> None:
    subprocess.run(["rm", "-rf", home / "out", home / "out.partial"], check=True)
    os.sync()


def rates_of(home: Path, turns: int) -> Known:
    """What one process does on this machine."""
    whole: list[float] = []
    layer: list[float] = []
    check, start, torch = [], [], []
    for _ in range(turns):
        start.append(timed(command("merge", home / "base", home / "adapter", "-o", home / "out", "--status", "-q")))
        for times, adapter in ((layer, "layer"), (whole, "adapter")):
            run = loratool_run(merge(home, adapter))
            times.append(run.wall)
            torch.append(run.startup)
            check.append(timed(command("verify", home / "out", "-q")))
            remove(home)
    plan, full, some = statistics.median(start), statistics.median(whole), statistics.median(layer)
    begin = plan + statistics.median(torch)
    first, second = (
        loratool.plan(home / "base", home / name, simulate=1).simulations[0] for name in ("adapter", "layer")
    )
    # full = computed/x + copied/y, and the same of the merge of one layer
    one, other = max(full - begin, 1e-3), max(some - begin, 1e-3)
    determinant = first.bytes_computed * second.bytes_copied - second.bytes_computed * first.bytes_copied
    computing = (one * second.bytes_copied - other * first.bytes_copied) / determinant
    copying = (other * first.bytes_computed - one * second.bytes_computed) / determinant
    read = first.bytes_written / max(statistics.median(check) - plan, 1e-3)
    return Known(1 / max(computing, 1e-12), 1 / max(copying, 1e-12), read, begin, plan, full)


def together(home: Path, count: int) -> float:
    """Seconds until the last of `count` processes has done its share."""
    started = time.perf_counter()
    workers = [
        subprocess.Popen(
            merge(home, "adapter", "--part", f"{number}/{count}"), env=environment(), stdout=subprocess.DEVNULL
        )
        for number in range(1, count + 1)
    ]
    try:
        if any(worker.wait() for worker in workers):
            raise SystemExit(f"a worker of {count} failed")
    finally:
        for worker in workers:
            worker.kill()
    return time.perf_counter() - started


def simulation_rows(home: Path, options: argparse.Namespace) -> list[Finding]:
    """What is foreseen and what is measured, side by side."""
    shape = SHAPES[options.shape]
    if (shape := shape.cut(options.size) if options.size < shape.base_bytes else shape).layers < 2:
        raise SystemExit(
            f"--size {options.size} leaves {shape.name} a single block, and two are needed to tell rates apart"
        )
    shape = replace(shape, shard_bytes=min(shape.shard_bytes, max(1, shape.base_bytes // 4)))
    make(shape, home)
    make_adapter(shape, home / "layer", layers=1)
    known = rates_of(home, options.turns)
    size = f"{shape.base_bytes / 1e9:.2f} GB"
    found = [
        at_least(f"{shape.name}, {size}, one process: computing", known.compute, None, rate),
        at_least(f"{shape.name}, {size}, one process: copying", known.copy, None, rate),
        at_least(f"{shape.name}, {size}, one process: reading again", known.read, None, rate),
        at_most(f"{shape.name}, {size}, one process: start-up", known.startup, None, seconds),
        at_most(f"{shape.name}, {size}, one process: all of it", known.alone, None, seconds),
    ]
    plan = loratool.plan(home / "base", home / "adapter")
    for count in COUNTS:
        say(f"{count} processes …")
        works, finishes = [], []
        for _ in range(options.turns):
            works.append(together(home, count))
            finishes.append(timed(merge(home, "adapter", "--finish")))
            remove(home)
        (foreseen,) = simulate(plan, (count,), known.shared(count))
        (last,) = simulate(plan, (1,), replace(known.shared(1), startup=known.plan))
        pairs = (
            ("shares", foreseen.startup_seconds + foreseen.work_seconds, statistics.median(works)),
            ("--finish", last.finish_seconds, statistics.median(finishes)),
        )
        for what, wanted, measured in pairs:
            name = f"{count} processes, {what}"
            found.append(at_most(f"{name}: simulated", wanted, None, seconds, note=f"limited by {foreseen.limit}"))
            found.append(at_most(f"{name}: measured", measured, None, seconds))
            found.append(at_most(f"{name}: off by", max(wanted, measured) / min(wanted, measured), TOLERANCE, ratio))
        if count > 1:
            found.append(at_least(f"{count} processes over one", known.alone / pairs[0][2], FASTEST, multiple))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    rows = {"simulation": simulation_rows}
    parser = parser_of(__doc__, rows)
    parser.add_argument(
        "--shape", choices=[*SHAPES], default="llama-3.2-1b", help="of the model [default: llama-3.2-1b]"
    )
    parser.add_argument(
        "--size", type=int, default=1 << 40, help="bytes of the base, at most: it has fewer blocks then"
    )
    measure(parser, rows, "distributed", arguments)


if __name__ == "__main__":
    main()
