"""A merged folder against W + (α/r)·BA in float64, rounded once: numpy only, nothing of loratool.

python benchmarks/accuracy.py BASE ADAPTER MERGED    prints one JSON object
"""

from __future__ import annotations

import json
import mmap
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stored = tuple[str, NDArray[Any]]  # dtype, values (bfloat16 as its bits)
TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}


@dataclass
class Counts:
    """What the comparison found. `equal`, `one_ulp` and `worse` count elements of edited weights."""

    edited: int = 0  # tensors
    equal: int = 0
    one_ulp: int = 0
    worse: int = 0
    cancelled: float = 0.0  # the largest |W′|/|W| among those worse: how far W and ΔW had to cancel
    absolute: float = 0.0  # the largest |error|/|W| among those worse
    largest: int = 0  # distance in steps of bfloat16
    copied: int = 0  # tensors that no update touches and that are the same bytes
    damaged: int = 0  # such tensors that are not


def compare(base: Path, adapter: Path, merged: Path) -> Counts:
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    before, factors, after = (read_folder(folder) for folder in (base, adapter, merged))
    if before.keys() != after.keys():
        raise SystemExit(f"tensors differ: {sorted(before.keys() ^ after.keys())[:5]}")
    counts, used = Counts(), 0
    for name, (dtype, weight) in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            same = after[name][0] == dtype and weight.shape == after[name][1].shape
            same = same and weight.tobytes() == after[name][1].tobytes()
            counts.copied += same
            counts.damaged += not same
            continue
        used += 2
        down, up = (factors[f"{key}.lora_{f}.weight"][1].astype(np.float64) for f in "AB")
        old, found = widen(weight), after[name][1]
        exact = old + scale * (up @ down)
        steps = np.abs(ordered(found) - ordered(round_to_bf16(exact)))
        counts.edited += 1
        counts.equal += int((steps == 0).sum())
        counts.one_ulp += int((steps == 1).sum())
        if (worse := steps > 1).any():
            counts.worse += int(worse.sum())
            size = np.abs(old[worse])
            with np.errstate(divide="ignore"):
                counts.cancelled = max(counts.cancelled, float((np.abs(exact[worse]) / size).max()))
                counts.absolute = max(counts.absolute, float((np.abs(widen(found[worse]) - exact[worse]) / size).max()))
        counts.largest = max(counts.largest, int(steps.max()))
    if used != len(factors):
        raise SystemExit(f"{len(factors) - used} factors of the adapter belong to no weight of the base")
    return counts


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


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_to_bf16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """To the nearest bfloat16, ties to even, straight from float64.

    By way of float32, as torch converts, the value would be rounded twice.
    """
    if np.any((np.abs(values) < 2.0**-126) & (values != 0)) or np.any(np.abs(values) > 3.0e38):
        raise SystemExit("a value is outside the normal range, which this oracle is not made for")
    bits = values.view(np.uint64)
    dropped = np.uint64(52 - 7)  # bits of mantissa that bfloat16 has not
    half = np.uint64((1 << 44) - 1)
    nearest = (bits + half + (bits >> dropped & np.uint64(1))) >> dropped << dropped
    narrow = nearest.view(np.float64).astype(np.float32).view(np.uint32)  # exact: 8 significant bits are left
    result: NDArray[np.uint16] = (narrow >> 16).astype(np.uint16)
    return result


def ordered(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """bfloat16 values as integers in the order of their size, so that neighbours differ by 1."""
    signed = bits.view(np.int16).astype(np.int32)
    return np.where(signed < 0, -32768 - signed, signed)


if __name__ == "__main__":
    print(json.dumps(asdict(compare(*map(Path, sys.argv[1:4])))))
