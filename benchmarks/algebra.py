"""What adapter algebra costs, beside what others do, in one run; each number stands beside its target.

    python benchmarks/algebra.py
    python benchmarks/algebra.py --mergekit DIR/bin/mergekit-extract-lora
    python benchmarks/algebra.py --only resize,ties --device cuda

Inputs are made in real models' shapes in `--where`, by default the system's folder for temporary files, and removed
afterwards. Errors are worked out in float64 from the files that were written. Commands of seconds run `--pairs` times
and their medians count; mergekit and dense SVD run once. All arithmetic of this script happens in processes of their
own: the memory of a contender cannot be told while its parent has held more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from algebra_inputs import Sizes, deltas, differences, linear_layers, write_adapter, write_pair, write_steep
from findings import Finding, at_least, at_most, finding_table, megabytes, multiple, seconds, write_result
from machine import describe
from running import HERE, Run, apart, cost_of, loratool_run, run, scratch
from shapes import SHAPES, Shape
from torch import Tensor

TIMED_BY_SVD = ((1024, 4096), (4096, 1024), (4096, 4096))  # (out, in) of the modules whose dense SVD is timed
SAME = 1e-6  # two optimal cuts differ by the rounding of what is stored: an error is no larger when within this
LONG = 10  # seconds of a peer's call, from which on one pair has to do
SMALL = {  # models that PEFT combines on, by their hidden size: how much is gained grows steeply with it
    1024: Shape("2 blocks, hidden 1024", 1024, 3584, 2, 8, 2, 256, tied=False, shard_bytes=0),
    2048: Shape("2 blocks of Llama-3.2-1B", 2048, 8192, 2, 32, 8, 256, tied=False, shard_bytes=0),
    4096: Shape("1 block of Llama-3-8B", 4096, 14336, 1, 32, 8, 256, tied=False, shard_bytes=0),
}
HOW_TO_GET_MERGEKIT = (
    "in an environment of its own: pip install mergekit, then --mergekit .../bin/mergekit-extract-lora"
)


def loratool(device: str, *words: str | Path) -> Run:
    """One command as a process, with its report."""
    return loratool_run([sys.executable, "-m", "loratool", *map(str, words), "--device", device, "-q", "--json"])


def working_seconds(measured: Run) -> float:
    return float(cost_of(measured.report)["seconds"]) - measured.startup


def repeated(device: str, pairs: int, out: Path, *words: str | Path) -> list[Run]:
    """The same command again and again, each into a folder of its own beside `out`; the last one is `out`."""
    return [
        loratool(device, *words, "-o", out if left == 0 else out.with_name(f"{out.name}-{left}"))
        for left in reversed(range(pairs))
    ]


def dense_svd_times() -> dict[tuple[int, int], float]:
    times: dict[tuple[int, int], float] = {}
    torch.linalg.svd(torch.randn(256, 256))  # wakes the library up
    for rows, columns in TIMED_BY_SVD:
        matrix = torch.randn(rows, 64) @ torch.randn(64, columns)
        started = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        times[rows, columns] = time.perf_counter() - started
    return times


def extrapolated(times: dict[tuple[int, int], float], sizes: Sizes) -> float:
    """What a dense SVD of every update would take: the times of three shapes, of the others by d·k·min(d, k)."""
    rate = sum(times.values()) / sum(r * c * min(r, c) for r, c in times)
    return sum(times.get((r, c), rate * r * c * min(r, c)) for r, c in sizes.values())


def resize(where: Path, device: str, pairs: int) -> list[Finding]:
    """An adapter of an 8B model from rank 64 to 16."""
    sizes = linear_layers(SHAPES["llama-3-8b"])
    adapter = apart(write_adapter, where / "8b", sizes, 64, 0)
    loratool(device, "resize", adapter, "-o", where / "first", "--rank", "16")  # its libraries come into the cache
    runs = repeated(device, pairs, where / "out", "resize", adapter, "--rank", "16")
    whole, work = median(one.wall for one in runs), median(map(working_seconds, runs))
    peak = max(one.peak_memory for one in runs)
    found = [
        at_most("resize, 8B shape, r 64 → 16: whole command", whole, 15 if device == "cpu" else None, seconds),
        at_most("  without start-up", work, 2 if device != "cpu" else None, seconds),
        Finding("  peak memory", megabytes(peak), peak),
    ]
    if device == "cpu":
        times = apart(dense_svd_times)
        dense = extrapolated(times, sizes)
        timed = ", ".join(f"{r}×{c} {taken:.1f} s" for (r, c), taken in times.items())
        note = f"{dense:.0f} s, extrapolated: timed once {timed}; the others by d·k·min(d, k)"
        found.append(beside("  dense SVD of every module, over the whole command", dense / whole, 300, note))
    return found


def beside(what: str, value: float, least: float, note: str) -> Finding:
    return at_least(what, value, least, multiple, note=note)


def distances(adapters: Sequence[Path], folders: Sequence[Path]) -> list[float]:
    """‖Σ ΔW − found‖ / ‖Σ ΔW‖ over all modules, of each folder."""
    wanted: dict[str, Tensor] = {}
    for adapter in adapters:
        for module, delta in deltas(adapter):
            wanted[module] = wanted[module] + delta if module in wanted else delta
    whole = sum(float(delta.square().sum()) for delta in wanted.values())
    errors = []
    for folder in folders:
        found = dict(deltas(folder))
        if found.keys() != wanted.keys():
            raise SystemExit(f"{folder.name} has other modules than what was combined")
        errors.append(math.sqrt(sum(float((wanted[m] - found[m]).square().sum()) for m in wanted) / whole))
    return errors


def combine(where: Path, device: str, pairs: int, hidden: int) -> list[Finding]:
    """Four adapters of rank 64 into one of rank 32, and the same by PEFT."""
    shape = SMALL[hidden]
    sizes = linear_layers(shape)
    where = where / str(hidden)
    adapters = [apart(write_adapter, where / f"part{n}", sizes, 64, n, torch.float32) for n in range(4)]
    config = where / "config.json"
    config.write_text(json.dumps(shape.model_config))
    loratool(device, "combine", *adapters, "-o", where / "sum")
    ours: list[Run] = []
    calls: dict[str, list[float]] = {"full": [], "reduced": []}
    walls: list[float] = []
    for turn in range(pairs):
        ours.append(loratool(device, "combine", *adapters, "-o", where / f"ours{turn}", "--rank", "32"))
        for kind, taken in calls.items():
            out = where / f"peft-{kind}{turn}"
            words = [sys.executable, str(HERE / "programs.py"), "peft-combine", str(config), str(out), "32", kind]
            measured, said, _ = run([*words, *map(str, adapters)])
            taken.append(float(json.loads(said.splitlines()[-1])["seconds"]))
            if kind == "full":
                walls.append(measured.wall)
        if calls["full"][0] > LONG:
            break
    mine, theirs, exact = apart(distances, adapters, [where / "ours0", where / "peft-full0/combined", where / "sum"])

    def times(taken: Sequence[float]) -> float:
        return median(call / working_seconds(one) for call, one in zip(taken, ours, strict=True))

    work = median(map(working_seconds, ours))
    whole = median(wall / one.wall for wall, one in zip(walls, ours, strict=True))
    note = f"{median(calls['full']):.2f} s, {work:.2f} s with reading, writing and the report; pairs: {len(ours)}"
    reduced = f"{median(calls['reduced']):.2f} s; svd_full_matrices=False, which is not PEFT's default"
    return [
        beside(f"combine 4 × r 64, linear, to r 32, {shape.name}: PEFT's call over it", times(calls["full"]), 50, note),
        Finding(
            "  with fewer singular vectors", f"{times(calls['reduced']):.1f}×", times(calls["reduced"]), note=reduced
        ),
        Finding("  whole commands", f"{whole:.1f}×", whole),
        Finding(
            "  error over PEFT's, less 1",
            f"{mine / theirs - 1:.1e}",
            mine / theirs,
            f"≤ {SAME:.0e}",
            mine <= theirs * (1 + SAME),
            f"{mine:.6f}",
        ),
        Finding("  error of the sum at full rank", f"{exact:.1e}", exact),
    ]


def judged(adapter: Path, cut: Path, rank: int, told: dict[str, dict[str, float]]) -> tuple[float, float]:
    """How far the error of a cut is from the least, and the reported one from the dense one, both relative."""
    before, after = dict(deltas(adapter)), dict(deltas(cut))
    excess = report = 0.0
    for module, dense in before.items():
        values = torch.linalg.svdvals(dense)
        best = float(values[rank:].norm())
        error = float((dense - after[module]).norm())
        said = told[f"{module}.weight"]
        excess = max(excess, abs(error / best - 1), abs(said["predicted"] * float(values.norm()) / best - 1))
        report = max(report, abs(said["achieved"] * float(dense.norm()) / error - 1))
    return excess, report


def accuracy(where: Path, device: str) -> list[Finding]:
    """Reported and dense errors, and the least that a rank allows."""
    sizes = {"a": (1024, 768), "b": (512, 1024), "c": (640, 640)}
    found: list[Finding] = []
    for kind, write in (("1/√k", write_adapter), ("steep", write_steep)):
        adapter = apart(write, where / kind.replace("/", ""), sizes, 64, 5, torch.float32)
        for dtype in ("float32", "bfloat16"):
            cut = adapter.with_name(f"{adapter.name}-{dtype}")
            measured = loratool(device, "resize", adapter, "-o", cut, "--rank", "16", "--dtype", dtype)
            excess, report = apart(judged, adapter, cut, 16, measured.report["modules"])
            name = f"singular values {kind}, stored as {dtype}"
            promised = dtype == "float32"  # what bfloat16 rounds is an error too, told but not promised
            found += [
                Finding(
                    f"{name}: truncation error over Eckart and Young's, less 1",
                    f"{excess:.1e}",
                    excess,
                    "≤ 1e-6" if promised else "",
                    excess <= 1e-6 if promised else None,
                ),
                Finding(
                    "  reported error over the dense one, less 1", f"{report:.1e}", report, "≤ 1e-5", report <= 1e-5
                ),
            ]
    return found


def extraction_errors(base: Path, tuned: Path, folders: Sequence[Path], modules: Sizes) -> list[float]:
    """‖(W_tuned − W_base) − found‖ over all linear layers, of each folder."""
    errors = []
    for folder in folders:
        products = dict(deltas(folder))
        if products.keys() != modules.keys():
            raise SystemExit(f"{folder.name} has other modules than the linear layers")
        squares = (float((m.double() - products[n]).square().sum()) for n, m in differences(base, tuned, modules))
        errors.append(math.sqrt(sum(squares)))
    return errors


def extract(where: Path, device: str, mergekit: Path | None) -> list[Finding]:
    """An adapter out of a fine-tune of 1B, and the same by mergekit."""
    base, tuned = apart(write_pair, where / "pair", "llama-3.2-1b")
    modules = linear_layers(SHAPES["llama-3.2-1b"])
    measured = loratool(device, "extract", base, tuned, "-o", where / "extracted", "--rank", "64")
    ours, theirs = where / "extracted", where / "mergekit"
    found = [
        at_most("extract, 1B shape, r 64: whole command", measured.wall, None, seconds),
        at_most("  peak memory", measured.peak_memory, 1e9 if device == "cpu" else None, megabytes),
    ]
    if mergekit is None:
        return [*found, Finding("  mergekit", "left out", 0, note=HOW_TO_GET_MERGEKIT)]
    words = [str(mergekit), "--model", str(tuned), "--base-model", str(base), "--out-path", str(theirs)]
    other, _, _ = run([*words, "--max-rank", "64", "--exclude-regex", "embed|head|norm", "--quiet"])
    errors = apart(extraction_errors, base, tuned, (ours, theirs), modules)
    times, worse = other.wall / measured.wall, errors[0] / errors[1]
    return [
        *found,
        beside(
            "  mergekit-extract-lora, over it",
            times,
            5,
            f"{other.wall:.0f} s, {other.processor:.0f} s of CPU time, once",
        ),
        Finding("  error over mergekit's", f"{worse:.4f}", worse, "≤ 1.003", worse <= 1.003),
        Finding("  mergekit's peak memory", megabytes(other.peak_memory), other.peak_memory),
    ]


def ties(where: Path, device: str, pairs: int) -> list[Finding]:
    """TIES on the entries of one large weight."""
    adapters = [apart(write_adapter, where / f"one{n}", {"m.q_proj": (4096, 4096)}, 16, n) for n in range(8)]
    words = ["--method", "ties", "--space", "dense", "--rank", "16", "--density", "0.2"]
    runs = repeated(device, pairs, where / "ties", "combine", *adapters, *words)
    wall, peak = median(one.wall for one in runs), max(one.peak_memory for one in runs)
    whole = 8 * 4096 * 4096 * 4
    note = f"8 dense updates take {megabytes(whole)}; Python and torch alone about 250 MB"
    return [
        at_most("dense ties of 8, 4096²: whole command", wall, 60 if device == "cpu" else None, seconds),
        Finding("  peak memory", megabytes(peak), peak, note=note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("resize", "combine", "accuracy", "extract", "ties")
    parser.add_argument("--only", default=",".join(parts), help="some of " + ", ".join(parts))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--mergekit", type=lambda word: Path(word).absolute(), help="the program mergekit-extract-lora")
    parser.add_argument("--pairs", type=int, default=3, help="runs of every short command; medians count")
    parser.add_argument("--combine-on", default="1024,2048,4096", help="hidden sizes; PEFT takes minutes on 4096")
    parser.add_argument("--where", type=Path, help="a folder for the inputs, which take up to 6 GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    try:
        hiddens = [int(word) for word in options.combine_on.split(",")]
    except ValueError:
        hiddens = []
    if not hiddens or not set(hiddens) <= SMALL.keys():
        parser.error(f"--combine-on knows {', '.join(map(str, SMALL))}")
    work: dict[str, Callable[[Path], list[Finding]]] = {
        "resize": lambda where: resize(where, options.device, options.pairs),
        "combine": lambda where: [
            one for hidden in hiddens for one in combine(where, options.device, options.pairs, hidden)
        ],
        "accuracy": lambda where: accuracy(where, options.device),
        "extract": lambda where: extract(where, options.device, options.mergekit),
        "ties": lambda where: ties(where, options.device, options.pairs),
    }
    chosen: Sequence[str] = [part for part in parts if part in options.only.split(",")]
    if unknown := set(options.only.split(",")) - set(parts):
        parser.error(f"--only knows {', '.join(parts)}, not {', '.join(sorted(unknown))}")
    if options.pairs < 1:
        parser.error("--pairs must be 1 or more")
    load = os.getloadavg()[0]
    found: list[Finding] = []
    with scratch(options.where, "algebra") as folder:
        facts = describe(folder, load)
        for part in chosen:
            print(f"{part} …", file=sys.stderr, flush=True)
            place = folder / part
            place.mkdir()
            found += work[part](place)
            write_result(options.json, facts, found)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(finding_table(found))


if __name__ == "__main__":
    main()
