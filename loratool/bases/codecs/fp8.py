"""FP8 with block scales, as DeepSeek-V3 and Qwen3-FP8 are stored: `X.weight` in e4m3 and `X.weight_scale_inv`.

W = values · scale, one scale for each block of the matrix: the name says inverse, and it multiplies. `config.json` names
the block's rows and columns (`quantization_config.weight_block_size`); blocks at the edges may be cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.bases.packed import Codec, Packed, Packing, Setting, Settings, plain_dtype
from loratool.bases.weights import Room, plain_of
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.lazy import Tensor, torch

SCALES = "_scale_inv"


@dataclass(frozen=True, kw_only=True)
class BlockScaled(Packed):
    """A matrix of e4m3 values, (rows, columns), with a float32 scale for each block, (⌈rows/b⌉, ⌈columns/b⌉)."""

    block: tuple[int, int]  # rows, columns

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        values, scales = self.tensors
        across = scales.info.shape[1]
        packed = room.read(values, first * self.line, count * self.line, device)
        decoded = packed.view(torch.float8_e4m3fn).view(count, self.line).float()
        blocks = torch.arange(first, first + count, device=device) // self.block[0]
        top, bottom = first // self.block[0], (first + count - 1) // self.block[0] + 1
        raw = Room(room.sources).read(scales, top * across * 4, (bottom - top) * across * 4, device)
        scale = raw.view(torch.float32).view(-1, across)[blocks - top]
        return decoded.mul_(scale.repeat_interleave(self.block[1], 1)[:, : self.line])


class Fp8(Codec):
    """FP8 in the layout that DeepSeek-V3 and Qwen3-FP8 share."""

    name, title = "fp8", "FP8"

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:
        block = block_of(settings)
        return None if block is None else Packing(weights(base, block))

    def left_plain(
        self, setting: Setting, packing: Packing, plain: Collection[str], base: Checkpoint
    ) -> Mapping[str, Any]:
        raise NotImplementedError


def weights(base: Checkpoint, block: tuple[int, int]) -> Mapping[str, Packed]:
    """The weights of a base that are stored this way. Raises `InputError` naming all whose scales do not fit."""
    found: dict[str, Packed] = {}
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
        found[name] = BlockScaled(
            shape=info.shape,
            line=info.shape[1],
            dtype=plain_dtype(base.config),
            tensors=(plain_of(base, name), plain_of(base, name + SCALES)),
            scheme=f"FP8, blocks of {block[0]} x {block[1]}",
            block=block,
        )
    if problems:
        raise InputError(f"{base.name}: FP8 weights whose block scales do not match:", problems)
    return found


def block_of(settings: Settings) -> tuple[int, int] | None:
    """Rows and columns of a block, where a config says that weights are stored this way."""
    if settings.method != "fp8":
        return None
    match settings.values.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None
