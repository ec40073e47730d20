"""Rows of `people.py`: 50 adapters compressed together, against `resize` of each at the same bytes, and the memory of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from algebra_inputs import PREFIX
from findings import Finding, at_most, megabytes, percent, seconds
from running import loratool_run
from safetensors.torch import save_file
from shapes import SHAPES
from torch import Tensor

import loratool

ADAPTERS, RANK = 50, 16
SIDE = 1024  # rows and columns of a module
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj")
SHARED, OWN = 32, 0.09  # directions of a family on each side, and how large the rest of each factor is
FAMILIES = {"related": (50,), "mixed": (20, 18, *(1,) * 12), "unrelated": (1,) * 50}
PART = 4  # of the bytes
STORED = 1e-3  # of an error: what rounding to the stored dtype may add


def updates(
    sizes: Sequence[int], shape: tuple[int, int], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """B and A of adapters in families of these sizes, whose singular values fall about as 1/j."""

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def factor(side: int, basis: Tensor | None) -> Tensor:
        own = drawn(side, RANK) / math.sqrt(side)
        if basis is None:
            return own
        common = basis @ (drawn(SHARED, RANK) / math.sqrt(SHARED))
        return common + OWN * own

    falling = 1 / torch.arange(1, RANK + 1)
    for size in sizes:
        bases = [torch.linalg.qr(drawn(side, SHARED)).Q if size > 1 else None for side in shape]
        for _ in range(size):
            yield factor(shape[0], bases[0]) * falling, factor(shape[1], bases[1]).T


def make_fleet(folder: Path, sizes: Sequence[int], shapes: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """A folder of adapters as PEFT saves them, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors: list[dict[str, Tensor]] = [{} for _ in range(sum(sizes))]
    for module, shape in shapes.items():
        for at, (b, a) in enumerate(updates(sizes, shape, generator)):
            tensors[at][f"{PREFIX}{module}.lora_B.weight"] = b.bfloat16().contiguous()
            tensors[at][f"{PREFIX}{module}.lora_A.weight"] = a.bfloat16().contiguous()
    words = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": words}
    for at, own in enumerate(tensors):
        (folder / f"a{at:02d}").mkdir(parents=True)
        save_file(own, folder / f"a{at:02d}" / "adapter_model.safetensors")
        (folder / f"a{at:02d}" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def compress(folder: Path, _: argparse.Namespace) -> list[Finding]:
    """A quarter of the bytes for all together, and a fiftieth of that for each by `resize --budget`."""
    found = []
    for kind, sizes in FAMILIES.items():
        fleet = make_fleet(folder / kind, sizes, dict.fromkeys(MODULES, (SIDE, SIDE)))
        budget = ADAPTERS * len(MODULES) * RANK * 2 * SIDE * 2 // PART
        ours = loratool.compress(fleet, folder / f"{kind}-out", budget=f"{budget}B")
        each = []
        for adapter in sorted(fleet.iterdir()):
            out = folder / f"{kind}-{adapter.name}"
            each.append(loratool.resize(adapter, out, budget=f"{budget // ADAPTERS}B").totals.achieved)
        resized = math.sqrt(sum(error**2 for error in each) / len(each))
        what = f"{ADAPTERS} {kind} adapters, {SIDE} × {SIDE}, rank {RANK}, a quarter of the bytes: error"
        said = "sharing pays" if ours.totals.pays else "says that sharing does not pay"
        found += [
            Finding(f"{what} of resize of each", percent(resized), resized),
            at_most(f"{what} of compress", ours.totals.error, resized * (1 + STORED), percent, note=said),
        ]
    return found


def compress_memory(folder: Path, _: argparse.Namespace) -> list[Finding]:
    """Modules of an 8B model, one after the other: the widest decides the memory of all."""
    linear = SHAPES["llama-3-8b"].linear
    shapes = {f"model.layers.0.{name}": linear[name] for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")}
    fleet = make_fleet(folder / "8b", FAMILIES["related"], shapes)
    words = [sys.executable, "-m", "loratool", "compress", str(fleet), "-o", str(folder / "8b-out"), "--budget", "8MB"]
    run = loratool_run([*words, "-q"])
    what = f"compress {ADAPTERS} adapters of rank {RANK}, modules of 8B"
    return [
        Finding(f"{what}: processor time of {len(shapes)}", seconds(run.processor), run.processor),
        at_most(f"{what}: peak memory", run.peak_memory, 1e9, megabytes),
    ]
