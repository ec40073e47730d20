"""A merged folder against W + s·BA: exact rational numbers on some elements, float64 on some rows. Nothing of loratool.

Only numpy is used. s is α/r times the adapter's weight.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stored = tuple[str, NDArray[Any]]  # dtype, values (bfloat16 as its bits)
TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
ROWS = 512  # of each module that are looked at
UNIT = 2.0**149  # every float32 and bfloat16 is a whole multiple of 1/UNIT


@dataclass(frozen=True)
class Module:
    """One edited weight, before and after."""

    name: str
    before: NDArray[np.uint16]  # (out, in), bits of bfloat16
    after: NDArray[np.uint16]
    up: NDArray[Any]  # (out, r), as stored
    down: NDArray[Any]  # (r, in)
    scale: float


def modules(base: Path, adapter: Path, merged: Path, weight: float) -> Iterator[Module]:
    """Every edited weight."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] * weight
    before, factors, after = (read_folder(folder) for folder in (base, adapter, merged))
    for name, (_, stored) in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            down, up = (widen(*factors[f"{key}.lora_{which}.weight"]) for which in "AB")
            yield Module(name, stored, after[name][1], up, down, scale)


def kept(base: Path, adapter: Path, merged: Path, weight: float) -> dict[str, Any]:
    """What rounding leaves of the update: `gain` over all modules, those of each, and the `error` ‖W' − W − ΔW‖ / ‖ΔW‖.

    On rows that are spread evenly over each weight.
    """
    gains: dict[str, float] = {}
    product = size = error = 0.0
    for each in modules(base, adapter, merged, weight):
        rows = np.linspace(0, len(each.up) - 1, min(ROWS, len(each.up))).astype(int)
        change = each.scale * (each.up[rows].astype(np.float64) @ each.down.astype(np.float64))
        found = widen("BF16", each.after[rows]).astype(np.float64) - widen("BF16", each.before[rows])
        inner, square, weight_of = float((found * change).sum()), float((change**2).sum()), len(each.up) / len(rows)
        gains[each.name] = round(inner / square, 6)
        product, size = product + inner * weight_of, size + square * weight_of
        error += float(((found - change) ** 2).sum()) * weight_of
    return {"gain": product / size, "gains": gains, "error": (error / size) ** 0.5}


def exact(base: Path, adapter: Path, merged: Path, count: int, weight: float = 1.0) -> dict[str, int]:
    """Of `count` elements at random places of all modules, how many are not the exact value, rounded once, ties to even."""
    generator = np.random.default_rng(2)
    every = list(modules(base, adapter, merged, weight))
    sizes = np.array([each.before.size for each in every], float)
    different = 0
    for each, some in zip(every, generator.multinomial(count, sizes / sizes.sum()), strict=True):
        places = generator.integers(0, each.before.size, some)
        rows, columns = np.divmod(places, each.before.shape[1])
        top, bottom = Fraction(each.scale).as_integer_ratio()
        weights = whole_numbers(widen("BF16", each.before[rows, columns]))
        left, right = whole_numbers(each.up[rows]), whole_numbers(each.down[:, columns].T)
        for at, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
            added = sum(one * other for one, other in zip(left[at], right[at], strict=True))
            value = Fraction(weights[at] * int(UNIT) * bottom + top * added, int(UNIT) ** 2 * bottom)
            different += int(each.after[row, column]) != nearest_bf16(value)
    return {"elements": count, "different": different}


def whole_numbers(values: NDArray[Any]) -> Any:
    """Each number times `UNIT`, as integers of any size."""
    scaled = values.astype(np.float64) * UNIT
    return [int(x) for x in scaled.tolist()] if scaled.ndim == 1 else [[int(x) for x in row] for row in scaled.tolist()]


def nearest_bf16(value: Fraction) -> int:
    """The bits of the bfloat16 number next to a value in the normal range, ties to even."""
    size = abs(value)
    near = int(np.float32(float(size)).view(np.uint32)) >> 16
    candidates = range(max(0, near - 1), near + 3)
    numbers = {bits: Fraction(float(np.uint32(bits << 16).view(np.float32))) for bits in candidates}
    best = min(candidates, key=lambda bits: (abs(numbers[bits] - size), bits & 1))
    return best | (0x8000 if value < 0 else 0)


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files, mapped, not loaded."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            kind, first = TYPES[entry["dtype"]], start + entry["data_offsets"][0]
            count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // kind.itemsize
            found[name] = entry["dtype"], np.frombuffer(data, kind, count, first).reshape(entry["shape"])
    return found


def widen(dtype: str, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers as float32, which holds them all."""
    return stored if dtype == "F32" else (stored.astype(np.uint32) << 16).view(np.float32)
