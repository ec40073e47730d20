"""The bases of `shapes.py` with their linear layers packed as quantised checkpoints hold them, with random values.

What a merge costs does not depend on the values, so nothing is quantised: packed values are random bits, and scales are
such that the weights they mean have the size of the plain ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from shapes import SHAPES, WEIGHT_STD, Shape, bf16_pool, write_json

Array = NDArray[Any]
Tensors = dict[str, Array]
GROUP = 128
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626)
NF4_MAP = np.array([*NF4, 0.7230, 1.0], np.float32)  # to four places, which is all that timing needs
STEP = WEIGHT_STD / 4.6  # of a uniform grid of 16 values with that standard deviation


def nf4(module: str, rows: int, columns: int, numbers: np.random.Generator) -> Tensors:
    """bitsandbytes, nested statistics."""
    blocks = rows * columns // 64
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2 * WEIGHT_STD}
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns], **nested}
    name = f"{module}.weight"
    return {
        name: bits(numbers, (rows * columns // 2, 1), np.uint8),
        f"{name}.absmax": bits(numbers, (blocks,), np.uint8),
        f"{name}.quant_map": NF4_MAP,
        f"{name}.nested_absmax": np.full(-(-blocks // 256), WEIGHT_STD, np.float32),
        f"{name}.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(said).encode(), np.uint8),
    }


def gptq(module: str, rows: int, columns: int, numbers: np.random.Generator) -> Tensors:
    """4 bits in groups of 128, zero points of v1."""
    return {
        f"{module}.qweight": bits(numbers, (columns // 8, rows), np.int32),
        f"{module}.qzeros": np.full((-(-columns // GROUP), rows // 8), 0x77777777, np.int32),
        f"{module}.scales": np.full((-(-columns // GROUP), rows), STEP, np.float16),
        f"{module}.g_idx": np.arange(columns, dtype=np.int32) // GROUP,
    }


def awq(module: str, rows: int, columns: int, numbers: np.random.Generator) -> Tensors:
    """4 bits in groups of 128, gemm."""
    return {
        f"{module}.qweight": bits(numbers, (columns, rows // 8), np.int32),
        f"{module}.qzeros": np.full((-(-columns // GROUP), rows // 8), 0x77777777, np.int32),
        f"{module}.scales": np.full((-(-columns // GROUP), rows), STEP, np.float16),
    }


def fp8(module: str, rows: int, columns: int, numbers: np.random.Generator) -> Tensors:
    """e4m3 in blocks of 128 x 128; the values are numbers of every size, but no NaN."""
    values = bits(numbers, (rows, columns), np.uint8)
    values[(values & 0x7F) == 0x7F] = 0
    return {
        f"{module}.weight": values,
        f"{module}.weight_scale_inv": np.full((-(-rows // GROUP), -(-columns // GROUP)), WEIGHT_STD / 100, np.float32),
    }


def bits(numbers: np.random.Generator, shape: tuple[int, ...], dtype: type) -> Array:
    """Random bits."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    made: Array = np.frombuffer(numbers.bytes(count), dtype).reshape(shape).copy()
    return made


CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": None,
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "activation_scheme": "dynamic"},
}
FAMILIES: dict[str, Callable[[str, int, int, np.random.Generator], Tensors]] = {
    "nf4": nf4,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
}


def make_packed(shape: Shape, family: str, folder: Path) -> None:
    """A base whose linear layers are packed, in one file; what is plain is as in `shapes.make_base`."""
    folder.mkdir(parents=True)
    numbers, pool = np.random.default_rng(0), bf16_pool(1 << 22)
    tensors: Tensors = {}
    eight: list[str] = []
    for name, _, size in shape.tensors:
        module = name.removesuffix(".weight")
        if ".layers." in name and len(size) == 2:
            tensors |= FAMILIES[family](module, *size, numbers)
            eight += [name] if family == "fp8" else []
        else:
            tensors[name] = np.resize(pool, size) if len(size) == 2 else np.full(size, 0x3F80, np.uint16)
    typed = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    for name, values in tensors.items():
        if values.dtype == np.uint16 or name in eight:  # numpy has no names for these two
            typed[name] = typed[name].view(torch.float8_e4m3fn if name in eight else torch.bfloat16)
    save_file(typed, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {**shape.model_config, "quantization_config": CONFIGS[family]})


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2] not in FAMILIES:
        sys.exit(f"usage: packed_shapes.py {{{','.join(SHAPES)}}} {{{','.join(FAMILIES)}}} DIR")
    make_packed(SHAPES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
