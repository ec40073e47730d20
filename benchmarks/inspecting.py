"""What `loratool inspect` costs, from headers, from values, and as a page in a browser.

    python benchmarks/inspecting.py

Adapters in the shape of Llama-3-8B and a checkpoint in the shape of Llama-3-70B with 30 files (sparse ones: only their
headers take room) are made below `--where` and removed again. A time is the wall time of a whole process, the best of
several; memory is the largest resident set that the kernel saw. Each number is printed beside its target.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from findings import Finding, at_most, finding_table, megabytes, seconds, write_result
from machine import describe
from painting import chromium
from running import run, run_quickly, scratch
from shapes import SHAPES, Tensor, adapter_config, nbytes, write_adapter, write_header, write_json

HEADERS, INDEX, VALUES, OPENED = 0.4, 1.0, 15.0, 2.0  # seconds
MEMORY = 400e6  # bytes besides the adapter's
ACCURACY = 1e-6  # of the largest singular value
RANK, ALPHA = 64, 128
SHARDS = 30
LARGE = SHAPES["llama-3-70b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--where", type=Path, help="folder for the files, 0.7 GB of them")
    parser.add_argument("--times", type=int, default=3, help="runs of which the best counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with scratch(arguments.where, "inspect") as folder:
        found, facts = list(findings(folder, arguments.times)), describe(folder, load)
    write_result(arguments.json, facts, found)
    print(finding_table(found))


def findings(folder: Path, times: int) -> Iterator[Finding]:
    adapter = make_adapter(folder / "adapter")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    modules = len(SHAPES["llama-3-8b"].adapter) // 2
    took = best(times, lambda: run_quickly(inspect(adapter))[0])
    yield at_most(f"`inspect` of an adapter of {modules} modules", took, HEADERS, seconds)
    base = make_base(folder / "base")
    took = best(times, lambda: run_quickly(inspect(base))[0])
    yield at_most(f"`inspect` of a 70B checkpoint in {SHARDS} files", took, INDEX, seconds)
    runs = [run([sys.executable, *inspect(adapter), "--values", "--device", "cpu"])[0] for _ in range(times)]
    took = min(each.wall - each.sync for each in runs)
    what = f"`--values` of an adapter of rank {RANK} on all linear layers of an 8B model, {size / 1e6:.0f} MB"
    yield at_most(what, took, VALUES, seconds)
    peak = max(each.peak_memory for each in runs)
    yield at_most("peak memory of that", peak, size + MEMORY, megabytes)
    yield at_most("singular values against dense float64, error / σ₁", accuracy(folder), ACCURACY, "{:.0e}".format)
    page = folder / "page.html"
    run_quickly([*inspect(adapter), "--html", str(page), "--device", "cpu"])
    if (drawn := opened(page, times)) is not None:
        what = f"its HTML report of {page.stat().st_size / 1e6:.2f} MB, until it is drawn in chromium"
        yield at_most(what, drawn, OPENED, seconds)


def inspect(path: Path) -> list[str]:
    return ["-m", "loratool", "inspect", str(path), "-q"]


def best(times: int, once: Callable[[], float]) -> float:
    return min(once() for _ in range(times))


def make_adapter(folder: Path) -> Path:
    """Random factors of rank 64 on every linear layer."""
    tensors: list[Tensor] = []
    for name, dtype, (rows, columns) in SHAPES["llama-3-8b"].adapter:
        tensors.append((name, dtype, (RANK, columns) if ".lora_A." in name else (rows, RANK)))
    write_adapter(folder, tensors, [name.partition(".")[2] for name in SHAPES["llama-3-8b"].linear])
    config = {**adapter_config(sorted(SHAPES["llama-3-8b"].linear)), "r": RANK, "lora_alpha": ALPHA}
    write_json(folder / "adapter_config.json", {**config, "target_modules": "all-linear"})
    return folder


def make_base(folder: Path) -> Path:
    """Headers, index and config of a checkpoint of 70B; its values are holes."""
    folder.mkdir()
    shards: list[list[Tensor]] = [[] for _ in range(SHARDS)]
    share = LARGE.base_bytes / SHARDS
    at = 0
    for tensor in LARGE.tensors:
        shards[min(SHARDS - 1, int(at / share))].append(tensor)
        at += nbytes(tensor)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        with open(folder / name, "wb", buffering=0) as stream:
            write_header(stream, tensors)
            stream.truncate(stream.tell() + sum(map(nbytes, tensors)))
        weight_map.update({tensor[0]: name for tensor in tensors})
    index = {"metadata": {"total_size": LARGE.base_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", LARGE.model_config)
    return folder


def accuracy(folder: Path) -> float:
    """The largest error of a singular value, in parts of the module's largest one, over small shapes of bad condition."""
    generator = np.random.default_rng(0)
    worst = 0.0
    for number, (rows, columns, rank) in enumerate(
        [(96, 64, 8), (64, 160, 32), (40, 40, 40), (24, 30, 48), (200, 200, 1)]
    ):
        up = (generator.standard_normal((rows, rank)) * np.logspace(0, -5, rank)).astype(np.float32)
        down = generator.standard_normal((rank, columns)).astype(np.float32)
        where = folder / f"small-{number}"
        write_small(where, up, down)
        report = run([sys.executable, *inspect(where)[:-1], "--values", "--json", "--device", "cpu"])[1]
        found = np.array(json.loads(report)["results"][0]["values"]["modules"][0]["singular_values"])
        exact = np.linalg.svd(up.astype(np.float64) @ down.astype(np.float64), compute_uv=False)[
            : min(rows, columns, rank)
        ]
        worst = max(worst, float(np.abs(found - exact).max() / exact[0]))
    return worst


def write_small(folder: Path, up: np.ndarray, down: np.ndarray) -> None:
    """An adapter of one module whose scale is 1."""
    folder.mkdir()
    factors = {"A": down, "B": up}
    tensors: Sequence[Tensor] = [(f"base_model.model.m.lora_{k}.weight", "F32", v.shape) for k, v in factors.items()]
    with open(folder / "adapter_model.safetensors", "wb") as stream:
        write_header(stream, tensors)
        stream.write(down.tobytes() + up.tobytes())
    rank = down.shape[0]
    write_json(folder / "adapter_config.json", {**adapter_config(["m"]), "r": rank, "lora_alpha": rank})


def opened(page: Path, times: int) -> float | None:
    """Seconds from the navigation to the last cell, the browser running; None without one."""
    with chromium() as browser:
        if browser is None:
            return None
        shortest = math.inf
        for _ in range(times):
            tab = browser.new_page()
            started = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector(".lines .chosen[d]", state="attached")
            shortest = min(shortest, time.perf_counter() - started)
            assert tab.locator(".cells path").count() == 224
            tab.close()
    return shortest


if __name__ == "__main__":
    main()
