"""What a merge costs beside `cp -r` and PEFT, and how exact it is, on this machine, in one go.

    python benchmarks/merge.py                                            the 1B shape on the CPU
    python benchmarks/merge.py --shape llama-3.2-1b --shape llama-3-8b --with-peft
    python benchmarks/merge.py --shape llama-3-8b --device cpu --device cuda --json result.json

A base and an adapter in a real model's shapes are made outside the repository, every contender
runs on them in turn as a whole process that ends in `sync`, and all that was made is removed,
after Ctrl-C too. This process itself stays small: the largest resident set that Linux reports for
a child is never less than that of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, NoReturn

from findings import (
    HELP_SECONDS,
    INSPECT_SECONDS,
    LIMITS,
    SAME_MEMORY,
    Finding,
    Limits,
    aligned,
    at_most,
    finding_table,
    fraction,
    judge_accuracy,
    megabytes,
    ratio,
    run_table,
    seconds,
)
from machine import available_memory, cores, describe, gpu_memory_samples, gpus
from running import (
    COPY,
    HERE,
    REPOSITORY,
    Contender,
    Run,
    contend,
    make_model,
    merge_contender,
    peft_contender,
    run,
    run_quickly,
)
from shapes import SHAPES, TINY, Shape

SECTIONS = ("copy", "peft", "memory", "accuracy", "start")
MERGED = {"copy", "peft", "memory"}  # those that run on the shapes
SPARE = 500_000_000  # bytes of disk to leave free
PEFT_MEMORY = 1.4  # times the base: where less is free, PEFT is not started
SIDE = 4096  # of the single weight
STARTS = 5


@dataclass
class Bench:
    """One call of the benchmark: what was asked for and what was found."""

    folder: Path
    shapes: list[Shape]
    devices: list[str]
    sections: set[str]
    pairs: int
    warm: bool
    gpu: bool
    found: dict[str, list[Finding]] = field(default_factory=dict)  # section → findings
    tables: list[str] = field(default_factory=list)
    runs: dict[str, dict[str, list[Run]]] = field(default_factory=dict)  # shape → contender → runs
    memory: dict[tuple[str, str], float] = field(default_factory=dict)  # (device, shape) → bytes above the adapter

    def measure(self) -> None:
        tiny = self.folder / "first"
        make_model(TINY.name, tiny)
        if self.sections & MERGED:
            say("every contender once on a tiny model, untimed, so that none pays for cold libraries …")
            for contender in self.contenders(TINY):
                contend(contender, tiny, warm=True)
            for shape in self.shapes:
                self.measure_shape(shape)
            self.compare_memory()
        if "accuracy" in self.sections:
            self.measure_accuracy(tiny)
        if "start" in self.sections:
            self.measure_help()
            if not self.runs:
                self.measure_inspect(TINY, tiny)

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in SECTIONS for finding in self.found.get(section, [])]

    def note(self, section: str, *findings: Finding) -> None:
        self.found.setdefault(section, []).extend(findings)

    def contenders(self, shape: Shape) -> list[Contender]:
        """Who runs on this shape, in turn."""
        found = [COPY] if "copy" in self.sections else []
        found += [merge_contender(device) for device in self.devices]
        if "peft" in self.sections:
            if PEFT_MEMORY * shape.base_bytes > available_memory():
                say(f"PEFT holds the model, and {shape.name} does not fit the free memory: PEFT is left out")
            else:
                found += [peft_contender(device) for device in self.devices]
        return found

    def measure_shape(self, shape: Shape) -> None:
        model = self.folder / shape.name
        say(f"making {shape.name}: {(shape.base_bytes + shape.adapter_bytes) / 1e9:.2f} GB …")
        make_model(shape.name, model)
        try:
            contenders = self.contenders(shape)
            runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
            for number in range(self.pairs if self.sections & {"copy", "peft"} else 1):
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    measured = contend(contender, model, self.warm)
                    runs[contender.name].append(measured)
                    say(f"  {shape.name}, round {number + 1}: {contender.name} {measured.wall:.2f} s")
            self.runs[shape.name] = runs
            self.tables.append(run_table(shape, runs))
            if "start" in self.sections:
                self.measure_inspect(shape, model)
            for device in self.devices:
                driver = self.watch_gpu(model, device) if "memory" in self.sections else 0
                self.judge(shape, device, runs, (model / "adapter/adapter_model.safetensors").stat().st_size, driver)
        finally:
            shutil.rmtree(model, ignore_errors=True)

    def watch_gpu(self, model: Path, device: str) -> int:
        """Bytes by which the driver's count of GPU memory grows in one more run, which is not timed."""
        if device == "cpu":
            return 0
        with gpu_memory_samples() as samples:
            contend(merge_contender(device), model, self.warm)
        return max(samples) - samples[0] if samples else 0

    def judge(self, shape: Shape, device: str, runs: dict[str, list[Run]], adapter: int, driver: int) -> None:
        """The findings of one shape on one device."""
        limits = LIMITS.get((shape.name, self.gpu), Limits())
        name = f"{shape.name}, {device}"
        ours = runs[f"loratool {device}"]
        if "copy" in self.sections:
            pairs = list(zip(ours, runs["cp -r"], strict=True))
            whole = [mine.wall / copy.wall for mine, copy in pairs]
            work = [(mine.wall - mine.startup) / copy.wall for mine, copy in pairs]
            self.note(
                "copy",
                at_most(
                    f"{name}: wall time over cp -r, whole process",
                    median(whole),
                    limits.whole,
                    ratio,
                    limits.whole_aim,
                    f"pairs {', '.join(map(ratio, whole))}",
                ),
                at_most(
                    f"{name}: the same without start-up",
                    median(work),
                    limits.work,
                    ratio,
                    note=f"start-up {seconds(median(mine.startup for mine in ours))}",
                ),
            )
        if f"PEFT {device}" in runs:
            over = [mine.wall / theirs.wall for mine, theirs in zip(ours, runs[f"PEFT {device}"], strict=True)]
            self.note(
                "peft",
                at_most(
                    f"{name}: wall time over PEFT",
                    median(over),
                    limits.peft,
                    fraction,
                    limits.peft_aim,
                    f"pairs {', '.join(map(fraction, over))}",
                ),
            )
        if "memory" in self.sections:
            peak = max(mine.peak_memory for mine in ours)
            above = peak - adapter
            self.memory[device, shape.name] = above
            self.note(
                "memory",
                at_most(f"{name}: peak resident memory", peak, limits.memory, megabytes),
                at_most(
                    f"{name}: the same less the adapter",
                    above,
                    limits.memory_above_adapter,
                    megabytes,
                    note=f"adapter {megabytes(adapter)}",
                ),
            )
            if reserved := max(mine.report["gpu_memory"] for mine in ours):
                note = f"{megabytes(driver)} more in use as the driver counts it, CUDA's context included"
                what = f"{name}: GPU memory of the merge"
                self.note("memory", at_most(what, reserved, limits.gpu_memory, megabytes, note=note))

    def compare_memory(self) -> None:
        for device in self.devices:
            peaks = {shape: peak for (where, shape), peak in self.memory.items() if where == device}
            if {"llama-3.2-1b", "llama-3-8b"} <= peaks.keys():
                small, large = sorted(peak for shape, peak in peaks.items() if shape != TINY.name)
                what = f"1B and 8B, {device}: larger over smaller peak, less the adapter"
                self.note("memory", at_most(what, large / small, None if self.gpu else SAME_MEMORY, ratio))

    def measure_accuracy(self, tiny: Path) -> None:
        """Two merges on each device, compared by a program that shares no code with loratool."""
        single = self.folder / "single"
        make_model(str(SIDE), single)
        for device in self.devices:
            say(f"comparing with the float64 formula, {device} …")
            for name, model in ((f"one {SIDE}² weight", single), ("a whole small model", tiny)):
                out = model / "out"
                run(merge_contender(device).command(model, out))
                paths = [str(folder) for folder in (model / "base", model / "adapter", out)]
                _, said, _ = run([sys.executable, str(HERE / "accuracy.py"), *paths])
                shutil.rmtree(out)
                self.note("accuracy", *judge_accuracy(f"{name}, {device}", json.loads(said)))
        shutil.rmtree(single)

    def measure_help(self) -> None:
        self.measure_start("loratool --help", ["--help"], HELP_SECONDS)

    def measure_inspect(self, shape: Shape, model: Path) -> None:
        self.measure_start(f"loratool inspect, {shape.name}", ["inspect", str(model / "base")], INSPECT_SECONDS)

    def measure_start(self, name: str, arguments: list[str], limit: float) -> None:
        """How long a command takes that needs no torch, and whether it leaves torch alone."""
        words = ["-m", "loratool", *arguments]
        trace = run_quickly(["-X", "importtime", *words])[1].splitlines()  # also fills the caches
        bare = median(run_quickly(["-c", "pass"])[0] for _ in range(STARTS))
        taken = median(run_quickly(words)[0] for _ in range(STARTS))
        note = f"median of {STARTS}; a bare interpreter takes {seconds(bare)}"
        modules = [line.rpartition("|")[2].strip() for line in trace if line.startswith("import time:")]
        torch = sum(module.split(".")[0] == "torch" for module in modules)
        shown = f"{torch} of {len(modules)}"
        self.note(
            "start",
            at_most(name, taken, limit, seconds, note=note),
            Finding(f"{name}: modules of torch imported", shown, torch, "0", torch == 0),
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", action="append", choices=list(SHAPES), help="once for each [default: llama-3.2-1b]")
    add("--device", action="append", choices=["cpu", "cuda"], help="once for each [default: cpu]")
    add("--pairs", type=int, default=3, help="rounds of all contenders [default: 3]")
    add("--with-peft", action="store_true", help="PEFT is a contender too")
    add("--only", help=f"comma-separated, of {', '.join(SECTIONS)} [default: all but peft]")
    add("--where", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure")
    add("--cache", choices=["warm", "cold"], default="warm", help="the inputs before each run [default: warm]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    options = parser.parse_args(arguments)
    options.shape = list(dict.fromkeys(options.shape or ["llama-3.2-1b"]))
    options.device = list(dict.fromkeys(options.device or ["cpu"]))
    options.only = set(options.only.split(",")) if options.only else {*SECTIONS} - {"peft"}
    options.only |= {"peft"} if options.with_peft else set()
    if unknown := options.only - {*SECTIONS}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    if options.pairs < 1:
        parser.error("--pairs: at least one is needed")
    if not options.where.is_dir():
        parser.error("--where: no such folder")
    if options.where.resolve().is_relative_to(REPOSITORY):
        parser.error("--where: a folder outside the repository is wanted")
    if "cuda" in options.device and not gpus():
        parser.error("--device cuda: there is no NVIDIA GPU here")
    if "peft" in options.only and find_spec("peft") is None:
        parser.error("--with-peft: peft is not installed; pip install peft transformers accelerate")
    check_space(parser, options)
    return options


def check_space(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The base, one output of the same size and the adapter lie there at the same time, for one shape after the other."""
    shapes = [SHAPES[name] for name in options.shape] if options.only & MERGED else [TINY]
    largest = max(shapes, key=lambda shape: shape.base_bytes)
    needed = 2 * largest.base_bytes + largest.adapter_bytes + SPARE
    free = shutil.disk_usage(options.where).free
    if free < needed:
        parser.error(
            f"{largest.name} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; "
            "give --where a folder with more room, or a smaller --shape"
        )


@contextmanager
def scratch(where: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, however this ends, unless by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    folder = Path(tempfile.mkdtemp(prefix="loratool-benchmark-", dir=where))
    try:
        yield folder
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # removing takes a moment, and must not be broken off
        shutil.rmtree(folder, ignore_errors=True)


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    load = os.getloadavg()[0]
    if load > 0.5 * cores():
        say(f"the machine is busy (load {load:.1f} on {cores()} cores): timings will be worse than they could be")
    with scratch(options.where) as folder:
        facts = describe(folder, load)
        bench = Bench(
            folder=folder,
            shapes=[SHAPES[name] for name in options.shape],
            devices=options.device,
            sections=options.only,
            pairs=options.pairs,
            warm=options.cache == "warm",
            gpu=bool(gpus()),
        )
        bench.measure()
    asked = f"{options.pairs} rounds, {options.cache} page cache, every run ends in sync"
    parts = [aligned(list(facts.items())), asked, *bench.tables, finding_table(bench.findings)]
    print("\n\n".join(parts))
    if options.json:
        table = {
            "machine": facts,
            "pairs": options.pairs,
            "cache": options.cache,
            "runs": {
                shape: {name: [plain(one) for one in measured] for name, measured in runs.items()}
                for shape, runs in bench.runs.items()
            },
            "findings": [asdict(found) for found in bench.findings],
        }
        options.json.write_text(json.dumps(table, indent=2) + "\n")


def plain(measured: Run) -> dict[str, Any]:
    """A run for JSON, without what names folders or fills pages."""
    kept = (
        "cost",
        "gpu_memory",
        "workers",
        "bytes_read",
        "bytes_written",
    )
    return {**asdict(measured), "report": {key: measured.report[key] for key in kept if key in measured.report}}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
