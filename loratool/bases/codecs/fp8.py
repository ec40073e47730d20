"""FP8 with block scales, as DeepSeek-V3 and Qwen3-FP8 are stored: `X.weight` in e4m3 and `X.weight_scale_inv`.

W = values · scale, one scale for each block of the matrix: the name says inverse, and it multiplies. `config.json` names
the block's rows and columns (`quantization_config.weight_block_size`); blocks at the edges may be cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.bases.weights import PACKING, Room, StoredWeight, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch

SCALES = "_scale_inv"


@dataclass(frozen=True)
class BlockScaled:
    """A matrix of e4m3 values with a float32 scale for each block, as a `StoredWeight`."""

    values: StoredTensor  # (rows, columns)
    scales: StoredTensor  # (⌈rows / block rows⌉, ⌈columns / block columns⌉)
    block: tuple[int, int]  # rows, columns
    dtype: str  # of the plain copy
    exact: str = "F32"  # products of 4 and 24 bits, rounded once

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.info.shape

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.values, self.scales

    def rows(
        self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room | None = None
    ) -> Tensor:
        if room is None:
            with OpenSources() as sources:
                return self.rows(first, count, device, dtype, Room(sources))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        columns, across = self.shape[1], self.scales.info.shape[1]
        packed = room.read(self.values, first * columns, count * columns, device)
        values = packed.view(torch.float8_e4m3fn).view(count, columns).to(compute)
        blocks = torch.arange(first, first + count, device=device) // self.block[0]
        top, bottom = first // self.block[0], (first + count - 1) // self.block[0] + 1
        raw = Room(room.sources).read(self.scales, top * across * 4, (bottom - top) * across * 4, device)
        scales = raw.view(torch.float32).view(-1, across)[blocks - top].to(compute)
        return values.mul_(scales.repeat_interleave(self.block[1], 1)[:, :columns]).to(dtype)

    def matrix(self, columns: int) -> BlockScaled:
        """Itself. Raises `ValueError` for another number of columns, by which blocks would not be cut."""
        if columns != self.shape[1]:
            raise ValueError(f"a matrix of {self.shape[1]} columns in blocks cannot be reshaped to {columns} columns")
        return self


def weights(base: Checkpoint) -> Mapping[str, StoredWeight]:
    """The weights of a base that are stored this way. Raises `InputError` naming all whose scales do not fit."""
    block = block_of(base.config.get(PACKING))
    if block is None:
        return {}

    found: dict[str, StoredWeight] = {}
    problems: list[str] = []
    for name, info in base.tensors.items():
        if info.dtype != "F8_E4M3" or not name.endswith(".weight"):
            continue
        scales = base.tensors.get(name + SCALES)
        wanted = tuple(-(-size // each) for size, each in zip(info.shape, block, strict=False))
        if scales is None or len(info.shape) != 2 or (scales.dtype, scales.shape) != ("F32", wanted):
            there = f"{scales.dtype} {list(scales.shape)}" if scales else "missing"
            problems.append(
                f"{printable(name + SCALES)} must be F32 {list(wanted)} for {list(info.shape)}, but it is {there}"
            )
            continue
        found[name] = BlockScaled(plain_of(base, name), plain_of(base, name + SCALES), block, plain_dtype(base.config))
    if problems:
        raise InputError(f"{base.name}: FP8 weights whose block scales do not match:", problems)
    return found


def block_of(packing: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, where a config says that weights are stored this way."""
    if not isinstance(packing, dict) or packing.get("quant_method") != "fp8":
        return None
    match packing.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def plain_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the model before it was packed, as its config tells; BF16 where it tells none."""
    named = {name: dtype for dtype, name in FLOAT_NAMES.items()}
    said = (config.get(key) for key in ("dtype", "torch_dtype"))
    return next((named[name] for name in said if isinstance(name, str) and name in named), "BF16")
