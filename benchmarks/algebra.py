"""What adapter algebra costs, beside what others do, in one run; each number stands beside its target.

    python benchmarks/algebra.py
    python benchmarks/algebra.py --mergekit DIR/bin/mergekit-extract-lora
    python benchmarks/algebra.py --only resize,ties --device cuda

Inputs are made in real models' shapes in `--where`, by default the system's folder for temporary files, and removed
afterwards. Errors are worked out in float64 from the files that were written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from algebra_inputs import Sizes, deltas, differences, linear_layers, write_adapter, write_pair
from findings import Finding, at_most, finding_table, megabytes, ratio, seconds
from machine import describe
from running import HERE, Run, run
from shapes import SHAPES
from torch import Tensor

TIMED_BY_SVD = ((1024, 4096), (4096, 1024), (4096, 4096))  # (out, in) of the modules whose dense SVD is timed
SMALL = {  # one block of Llama-3-8B: the model that PEFT combines on
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
HOW_TO_GET_MERGEKIT = (
    "in an environment of its own: pip install mergekit, then --mergekit .../bin/mergekit-extract-lora"
)


def loratool(device: str, *words: str | Path) -> Run:
    """One command as a process, with its report."""
    command = [sys.executable, "-m", "loratool", *map(str, words), "--device", device, "-q", "--json"]
    measured, said, _ = run(command)
    measured.report = json.loads(said)
    measured.peak_memory = max(measured.peak_memory, measured.report["peak_memory"])
    return measured


def working_seconds(measured: Run) -> float:
    return float(measured.report["seconds"]) - measured.startup


def dense_svd_seconds(sizes: Sizes) -> float:
    """What a dense SVD of every update would take: of three shapes timed, of the others by d·k·min(d, k)."""
    times: dict[tuple[int, int], float] = {}
    for rows, columns in TIMED_BY_SVD:
        matrix = torch.randn(rows, 64) @ torch.randn(64, columns)
        started = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        times[rows, columns] = time.perf_counter() - started
    rate = sum(times.values()) / sum(r * c * min(r, c) for r, c in times)
    return sum(times.get((r, c), rate * r * c * min(r, c)) for r, c in sizes.values())


def resize(where: Path, device: str) -> list[Finding]:
    """An adapter of an 8B model from rank 64 to 16."""
    sizes = linear_layers(SHAPES["llama-3-8b"])
    adapter = write_adapter(where / "8b", sizes, 64, 0)
    loratool(device, "resize", adapter, "-o", where / "first", "--rank", "16")  # its libraries come into the cache
    measured = loratool(device, "resize", adapter, "-o", where / "out", "--rank", "16")
    found = [
        at_most("resize, 8B shape, r 64 → 16: whole command", measured.wall, 15 if device == "cpu" else None, seconds),
        at_most("  without start-up", working_seconds(measured), 2 if device != "cpu" else None, seconds),
        Finding("  peak memory", megabytes(measured.peak_memory), measured.peak_memory),
    ]
    if device == "cpu":
        dense = dense_svd_seconds(sizes)
        times = dense / working_seconds(measured)
        note = f"{dense:.0f} s, from 3 modules that were timed and d·k·min(d, k) for the others"
        found.append(
            Finding("  dense SVD of every module, over it", f"{times:.0f}×", times, "≥ 300×", times >= 300, note)
        )
    return found


def distance(wanted: dict[str, Tensor], folder: Path) -> float:
    """‖Σ wanted − found‖ / ‖wanted‖ over all modules."""
    off = whole = 0.0
    for module, found in deltas(folder):
        off += float((wanted[module] - found).square().sum())
        whole += float(wanted[module].square().sum())
    return math.sqrt(off / whole)


def combine(where: Path, device: str) -> list[Finding]:
    """Four adapters of rank 64 into one of rank 32, and the same by PEFT."""
    sizes = linear_layers(SHAPES["llama-3-8b"], 1)
    adapters = [write_adapter(where / f"part{n}", sizes, 64, n, torch.float32) for n in range(4)]
    loratool(device, "combine", *adapters, "-o", where / "sum")
    measured = loratool(device, "combine", *adapters, "-o", where / "ours", "--rank", "32")
    (where / "config.json").write_text(json.dumps(SMALL))
    words = [sys.executable, str(HERE / "peft_combine.py"), str(where / "config.json"), str(where / "peft"), "32"]
    peft, said, _ = run([*words, *map(str, adapters)])
    call = float(json.loads(said.splitlines()[-1])["seconds"])
    wanted: dict[str, Tensor] = {}
    for adapter in adapters:
        for module, delta in deltas(adapter):
            wanted[module] = wanted[module] + delta if module in wanted else delta
    ours, theirs, exact = (distance(wanted, where / name) for name in ("ours", "peft/combined", "sum"))
    times = call / working_seconds(measured)
    return [
        Finding(
            "combine 4 × r 64, linear, to r 32: PEFT's call over it, start-ups left out",
            f"{times:.0f}×",
            times,
            "≥ 50×",
            times >= 50,
            f"{call:.1f} s, {working_seconds(measured):.2f} s with reading, writing and the report",
        ),
        Finding("  whole commands", f"{peft.wall / measured.wall:.1f}×", peft.wall / measured.wall),
        Finding(
            "  error over PEFT's",
            ratio(ours / theirs),
            ours / theirs,
            "≤ 1",
            ours <= theirs * (1 + 1e-6),
            f"{ours:.6f}",
        ),
        Finding("  error of the sum at full rank", f"{exact:.1e}", exact),
    ]


def accuracy(where: Path, device: str) -> list[Finding]:
    """Reported and dense errors, and the least that a rank allows."""
    sizes = {"a": (1024, 768), "b": (512, 1024), "c": (640, 640)}
    adapter = write_adapter(where / "small", sizes, 64, 5, torch.float32)
    measured = loratool(device, "resize", adapter, "-o", where / "cut", "--rank", "16", "--dtype", "float32")
    before, after = dict(deltas(adapter)), dict(deltas(where / "cut"))
    excess = report = 0.0
    for module, dense in before.items():
        values = torch.linalg.svdvals(dense)
        best = float(values[16:].norm())
        error = float((dense - after[module]).norm())
        told = measured.report["modules"][f"{module}.weight"]
        excess = max(excess, abs(error / best - 1), abs(told["predicted"] * float(values.norm()) / best - 1))
        report = max(report, abs(told["achieved"] * float(dense.norm()) / error - 1))
    return [
        Finding("truncation error over Eckart and Young's, less 1", f"{excess:.1e}", excess, "≤ 1e-6", excess <= 1e-6),
        Finding("reported error over the dense one, less 1", f"{report:.1e}", report, "≤ 1e-5", report <= 1e-5),
    ]


def extract(where: Path, device: str, mergekit: Path | None) -> list[Finding]:
    """An adapter out of a fine-tune of 1B, and the same by mergekit."""
    base, tuned = write_pair(where / "pair", "llama-3.2-1b")
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
    errors = [0.0, 0.0]
    for at, folder in enumerate((ours, theirs)):
        products = dict(deltas(folder))
        errors[at] = math.sqrt(
            sum(float((m.double() - products[n]).square().sum()) for n, m in differences(base, tuned, modules))
        )
    times, worse = other.wall / measured.wall, errors[0] / errors[1]
    return [
        *found,
        Finding("  mergekit-extract-lora, over it", f"{times:.1f}×", times, "≥ 5×", times >= 5, f"{other.wall:.0f} s"),
        Finding("  error over mergekit's", f"{worse:.4f}", worse, "≤ 1.003", worse <= 1.003),
        Finding("  mergekit's peak memory", megabytes(other.peak_memory), other.peak_memory),
    ]


def ties(where: Path, device: str) -> list[Finding]:
    """TIES on the entries of one large weight."""
    adapters = [write_adapter(where / f"one{n}", {"m.q_proj": (4096, 4096)}, 16, n) for n in range(8)]
    words = ["--method", "ties", "--space", "dense", "--rank", "16", "--density", "0.2"]
    measured = loratool(device, "combine", *adapters, "-o", where / "ties", *words)
    whole = 8 * 4096 * 4096 * 4
    note = f"8 dense updates take {megabytes(whole)}; Python and torch alone about 250 MB"
    return [
        at_most("dense ties of 8, 4096²: whole command", measured.wall, 60 if device == "cpu" else None, seconds),
        Finding("  peak memory", megabytes(measured.peak_memory), measured.peak_memory, note=note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("resize", "combine", "accuracy", "extract", "ties")
    parser.add_argument("--only", default=",".join(parts), help="some of " + ", ".join(parts))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--mergekit", type=Path, help="the program mergekit-extract-lora")
    parser.add_argument("--where", type=Path, help="a folder for the inputs, which take up to 6 GB")
    options = parser.parse_args()
    work: dict[str, Callable[[Path], list[Finding]]] = {
        "resize": lambda where: resize(where, options.device),
        "combine": lambda where: combine(where, options.device),
        "accuracy": lambda where: accuracy(where, options.device),
        "extract": lambda where: extract(where, options.device, options.mergekit),
        "ties": lambda where: ties(where, options.device),
    }
    chosen: Sequence[str] = [part for part in parts if part in options.only.split(",")]
    load = os.getloadavg()[0]
    found: list[Finding] = []
    with tempfile.TemporaryDirectory(dir=options.where, prefix="loratool-algebra-") as folder:
        for part in chosen:
            print(f"{part} …", file=sys.stderr, flush=True)
            place = Path(folder, part)
            place.mkdir()
            found += work[part](place)
        for name, value in describe(Path(folder), load).items():
            print(f"{name}: {value}")
    print(finding_table(found))


if __name__ == "__main__":
    main()
