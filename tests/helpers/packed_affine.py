"""Weights of 8 bits in blocks as torchao and quanto save them, with values by the documented formulas."""

from __future__ import annotations

import json

import numpy as np
import torch
from quantised_models import FP8_MAX, Array, Quantised, Weights, entries, in_fp8, in_integers, largest


def description(kind: str, block: object, parts: list[str], bits: int = 8) -> str:
    """What torchao says of a weight in the header of its file."""
    data = {"block_size": block, "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    if bits != 8:
        data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{bits}"}
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})


def in_steps(values: Array, sides: tuple[int, int], *, bits: int, fp8: bool) -> tuple[torch.Tensor, Array, Array]:
    """What is stored of some values, a scale for each block, and what both mean in float32."""
    if fp8:
        scales = largest(values, sides) / np.float32(FP8_MAX)
        stored, numbers = in_fp8(values / entries(scales, values.shape, sides))
    else:
        integers, scales, _ = in_integers(values, sides, bits, symmetric=True)
        stored, numbers = torch.from_numpy(integers.astype(np.int8)), integers.astype(np.float32)
    return stored, scales, numbers * entries(scales, values.shape, sides)


def torchao(weights: Weights, kind: str, columns: int | None = None, bits: int = 8) -> Quantised:
    """A scale for so many columns of a row, or for all of them; integers with zero points of 0."""
    made = Quantised({"quant_method": "torchao", "quant_type": {"default": {}}, "modules_to_not_convert": None})
    for name, weight in weights.items():
        values = weight.float().numpy()
        sides = (1, columns or values.shape[1])
        stored, scales, decoded = in_steps(values, sides, bits=bits, fp8=kind == "Float8Tensor")
        parts: dict[str, Array | torch.Tensor] = {"_weight_qdata": stored, "_weight_scale": scales}
        if kind != "Float8Tensor":
            parts["_weight_zero_point"] = np.zeros(scales.shape, np.int8)
        made.add(name, decoded, **parts)
        made.metadata[name] = description(kind, list(sides), [part.removeprefix("_weight_") for part in parts], bits)
    return made


def quanto(weights: Weights, axis: int | None, *, fp8: bool = False) -> Quantised:
    """A scale for each row (axis 0), for each column (1), or for all."""
    made = Quantised({"quant_method": "quanto", "weights": "float8" if fp8 else "int8"})
    for name, weight in weights.items():
        values = weight.float().numpy()
        rows, columns = values.shape
        sides = {0: (1, columns), 1: (rows, 1), None: (rows, columns)}[axis]
        stored, scales, decoded = in_steps(values, sides, bits=8, fp8=fp8)
        scales = scales.reshape(()) if axis is None else scales
        parts: dict[str, Array | torch.Tensor] = {"weight._data": stored, "weight._scale": scales}
        made.add(name, decoded, **parts)
    return made
