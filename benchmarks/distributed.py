"""Merges by 1, 2, 4 and 8 processes of this machine (`--part I/N`, `--finish`), next to what `plan --simulate` says.

    python benchmarks/distributed.py [--shape NAME] [--size BYTES] [--json FILE]

The rates that a simulation needs are those that single processes report of themselves: a merge of which every byte is
copied gives that of copying, the merge of all layers that of computing, and `verify` by the record, with files that
are not in the page cache, that of reading again. What a process takes besides comes from a tiny model, whose bytes cost
nothing: a `--part 1/1` gives the start-up of a worker, to which torch comes where the large merge needs it, and its
`--finish` gives what that takes apart from reading.

All processes share the cores and the disk of this machine, so each of N has an N-th of these rates. The simulation then
has to foresee how long N processes take together, and the check of `--finish` after them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from findings import Finding, at_least, at_most, rate, ratio, seconds
from machine import cores
from rows import measure, parser_of
from running import Run, environment, loratool_run, say, set_cache
from shapes import SHAPES, TINY, Shape, make, make_saved_norm

import loratool
from loratool.merging.merge_options import PlanOptions
from loratool.merging.planning import plan_merge
from loratool.merging.simulating import Rates, simulate

COUNTS = (1, 2, 4, 8)
TOLERANCE = 1.5  # between what is foreseen and what is measured, either way
FASTEST = 0.9  # N processes over one with the same cores


@dataclass(frozen=True)
class Known:
    """What one process does on this machine, in bytes a second; and how long it takes to start, in seconds."""

    compute: float
    copy: float
    read: float
    startup: float  # of a worker, until torch is there and headers are read
    effort: float  # of that, seconds of processors, of which there are only so many
    finish: float  # of `--finish`: headers, small files, publishing

    @classmethod
    def of(cls, runs: dict[str, list[Run]], computed: int, copied: int) -> Known:
        """From the runs of one process, by name; the merge computes and copies so many bytes."""
        size, torch = computed + copied, middle(one.startup for one in runs["merge"])
        copying = middle(one.work for one in runs["copy"]) / size
        # bytes are copied while torch is imported
        left = max(0.0, copied * copying - torch)
        more = max(0.0, torch - middle(one.startup for one in runs["start"]))  # small merges do without it
        computing = max(middle(one.work for one in runs["merge"]) - left, 1e-3) / computed
        return cls(
            1 / computing,
            1 / copying,
            size / middle(one.work for one in runs["verify"]),
            middle(one.wall for one in runs["start"]) + more,
            middle(one.processor for one in runs["start"]) + more,
            middle(one.wall for one in runs["end"]),
        )

    def shared(self, count: int) -> Rates:
        """What each of `count` processes can do, that run at the same time on the same cores and the same disk."""
        startup = max(self.startup, count * self.effort / cores())
        return Rates(self.read, compute=self.compute / count, copy=self.copy / count, startup=startup)


def middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def merge(model: Path, *more: str | Path, adapter: str = "adapter") -> list[str]:
    words = ["merge", model / "base", model / adapter, "-o", model / "out", "--device", "cpu", "--json", *more]
    return [sys.executable, "-m", "loratool", *map(str, words)]


def remove(model: Path) -> None:
    subprocess.run(["rm", "-rf", model / "out", model / "out.partial"], check=True)
    os.sync()


def alone(home: Path, tiny: Path) -> dict[str, Run]:
    """What single processes take, once each."""
    runs = {"start": loratool_run(merge(tiny, "--part", "1/1")), "end": loratool_run(merge(tiny, "--finish"))}
    remove(tiny)
    runs["copy"] = loratool_run(merge(home, adapter="norm"))
    remove(home)
    runs["merge"] = loratool_run(merge(home))
    set_cache(home, warm=False, files="out/*.safetensors")
    runs["verify"] = loratool_run([sys.executable, "-m", "loratool", "verify", str(home / "out"), "--json"])
    remove(home)
    return runs


def together(home: Path, count: int) -> float:
    """Seconds until the last of `count` processes has done its share."""
    started = time.perf_counter()
    workers = [
        subprocess.Popen(merge(home, "--part", f"{number}/{count}"), env=environment(), stdout=subprocess.DEVNULL)
        for number in range(1, count + 1)
    ]
    try:
        if any(worker.wait() for worker in workers):
            raise SystemExit(f"a worker of {count} failed")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return time.perf_counter() - started


def chosen(options: argparse.Namespace) -> Shape:
    """The shape that is asked for, with no more blocks than the size allows, in four files."""
    shape = SHAPES[options.shape]
    shape = shape.cut(options.size) if options.size < shape.base_bytes else shape
    return replace(shape, shard_bytes=min(shape.shard_bytes, max(1, shape.base_bytes // 4)))


def simulation_rows(folder: Path, options: argparse.Namespace) -> list[Finding]:
    """What is foreseen and what is measured, side by side."""
    shape, home, tiny = chosen(options), folder / "model", folder / "tiny"
    make(shape, home)
    make(TINY, tiny)
    make_saved_norm(shape, home / "norm")
    plan = plan_merge(loratool.open_checkpoint(home / "base"), [loratool.read_adapter(home / "adapter")], PlanOptions())
    (whole,) = simulate(plan, (1,), Rates())
    single: dict[str, list[Run]] = {}
    works: dict[int, list[float]] = {count: [] for count in COUNTS}
    finishes: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(options.turns):
        say(f"turn {turn + 1}: single processes …")
        for name, one in alone(home, tiny).items():
            single.setdefault(name, []).append(one)
        for count in COUNTS:
            say(f"turn {turn + 1}: {count} processes …")
            works[count].append(together(home, count))
            finishes[count].append(loratool_run(merge(home, "--finish")).wall)
            remove(home)
    known, size = Known.of(single, whole.bytes_computed, whole.bytes_copied), f"{shape.base_bytes / 1e9:.2f} GB"
    took = middle(one.wall for one in single["merge"])
    found = [*known_findings(known, f"{shape.name}, {size}"), Finding("a merge by one process", seconds(took), took)]
    for count in COUNTS:
        (foreseen,) = simulate(plan, (count,), known.shared(count))
        (last,) = simulate(plan, (1,), replace(known.shared(1), startup=known.finish))
        work, finish = middle(works[count]), middle(finishes[count])
        wanted = foreseen.startup_seconds + foreseen.work_seconds
        what = f"{count} process{'es' if count > 1 else ''}"
        found += compared(f"{what}, shares", wanted, work, foreseen.limit)
        found += compared(f"{what}, --finish", last.finish_seconds, finish)
        if count > 1:
            found.append(at_least(f"{what} over a merge by one", took / work, FASTEST, ratio))
    return found


def known_findings(known: Known, what: str) -> list[Finding]:
    """What the simulation starts from."""
    return [
        Finding(f"{what}, one process: {name}", show(value), value)
        for name, value, show in (
            ("computing", known.compute, rate),
            ("copying", known.copy, rate),
            ("reading again", known.read, rate),
            ("start-up", known.startup, seconds),
            ("--finish without reading", known.finish, seconds),
        )
    ]


def compared(name: str, foreseen: float, measured: float, limit: str = "") -> list[Finding]:
    """What was foreseen next to what was measured."""
    return [
        Finding(f"{name}: simulated", seconds(foreseen), foreseen, note=f"limited by {limit}" if limit else ""),
        Finding(f"{name}: measured", seconds(measured), measured),
        at_most(f"{name}: off by", max(foreseen, measured) / min(foreseen, measured), TOLERANCE, ratio),
    ]


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
