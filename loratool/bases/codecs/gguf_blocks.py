"""Blocks of the common GGUF types: the bits that the `gguf` package decodes, several times as fast.

Quantised values lie in bytes, two or more in each. They are spread into bytes of their own eight at a time, as integers
of 64 bits, become float32 there and are scaled in place. Every product and every difference is rounded by itself, as
numpy rounds them. Layouts are those of ggml-quants.c in llama.cpp.

Decoders are written with what numpy and torch have in common, and take the package as `xp`: torch decodes on any
device, and numpy where torch is not needed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratool.layouts.ggml import TYPES
from loratool.lazy import NDArray, Tensor, numpy, torch

Array = Any  # of numpy or of torch


def in_bytes(value: int) -> int:
    """A byte again in each of the eight of an integer."""
    return int.from_bytes(bytes([value]) * 8, "little", signed=True)


NIBBLES, ODD_BITS, PAIRS = map(in_bytes, (0x0F, 0x01, 0x03))


def words(data: Array, xp: Any) -> Array:
    """(blocks, bytes) of uint8 → (blocks, bytes / 8) of int64, in memory of its own where that is needed."""
    return data.reshape(-1).view(xp.int64).reshape(len(data), -1)


def half(data: Array, xp: Any) -> Array:
    """(blocks, 2n) of uint8 → (blocks, n) of float32: the float16 that they are."""
    return xp.asarray(data.reshape(-1).view(xp.float16), dtype=xp.float32).reshape(len(data), -1)


def q8_0(data: Array, out: Array, xp: Any) -> None:
    """A scale, and 32 integers of 8 bits."""
    values = out.reshape(len(data), 32)
    values[...] = data[:, 2:].view(xp.int8)
    values *= half(data[:, :2], xp)


def scales_and_minima(data: Array, xp: Any) -> tuple[Array, Array]:
    """The first 16 bytes of Q4_K and Q5_K → scale and minimum of each 32 values, (blocks, 8, 1) of float32."""
    factors, packed = half(data[:, :4], xp), data[:, 4:16].reshape(-1, 3, 4)
    low, mixed = packed[:, :2] & 0x3F, packed[:, 2]
    high = (packed[:, :2] >> 2) & 0x30
    high[:, 0] |= mixed & 0x0F
    high[:, 1] |= mixed >> 4
    scaled = xp.asarray(xp.concatenate((low, high), 2), dtype=xp.float32)
    scaled *= factors[:, :, None]
    return scaled[:, 0, :, None], scaled[:, 1, :, None]


def q4_k(data: Array, out: Array, xp: Any) -> None:
    """Two factors of scales, 8 scales and minima of 6 bits, 256 integers of 4 bits."""
    scales, minima = scales_and_minima(data, xp)
    packed, pairs = words(data, xp), out.reshape(len(data), 4, 2, 32)
    for place, spread in enumerate((packed & NIBBLES, (packed >> 4) & NIBBLES)):
        pairs[:, :, place] = spread.view(xp.uint8)[:, 16:].reshape(-1, 4, 32)
    values = out.reshape(len(data), 8, 32)
    values *= scales
    values -= minima


def q5_k(data: Array, out: Array, xp: Any) -> None:
    """As Q4_K, with a fifth bit of each integer, which come first."""
    scales, minima = scales_and_minima(data, xp)
    packed, values = words(data, xp), out.reshape(len(data), 8, 32)
    bits, packed = packed[:, 2:6], packed[:, 6:].reshape(-1, 4, 4)
    for place in range(8):
        fifth = ((bits >> place) & ODD_BITS) << 4
        spread = fifth | ((packed[:, place // 2] >> 4 * (place % 2)) & NIBBLES)
        values[:, place] = spread.view(xp.uint8)
    values *= scales
    values -= minima


def q6_k(data: Array, out: Array, xp: Any) -> None:
    """256 integers of 4 bits, two more bits of each, 16 scales of 8 bits, a factor of scales."""
    low, bits = words(data[:, :128], xp).reshape(-1, 2, 2, 4), words(data[:, 128:192], xp).reshape(-1, 2, 1, 4)
    spread = xp.concatenate((low & NIBBLES, (low >> 4) & NIBBLES), 2)
    for place in range(4):
        spread[:, :, place : place + 1] |= ((bits >> 2 * place) & PAIRS) << 4
    scales = xp.asarray(data[:, 192:208].view(xp.int8), dtype=xp.float32)
    scales *= half(data[:, 208:], xp)
    integers = spread.view(xp.int8)
    integers -= 32
    values = out.reshape(len(data), 16, 16)
    values[...] = integers.reshape(-1, 16, 16)
    values *= scales[:, :, None]


DECODERS: Mapping[str, Callable[[Array, Array, Any], None]] = {
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def decoded(raw: Tensor, kind: str) -> Tensor:
    """(bytes,) of uint8, whole blocks of a type in `DECODERS` → (values,) of float32 on the same device."""
    packing = TYPES[kind]
    data = raw.view(-1, packing.nbytes)
    values = torch.empty(len(data) * packing.values, dtype=torch.float32, device=raw.device)
    DECODERS[kind](data, values, torch)
    return values


def decode_into(values: NDArray[Any], raw: NDArray[Any], kind: str) -> None:
    """The same by numpy, into (values,) of float32."""
    DECODERS[kind](raw.reshape(-1, TYPES[kind].nbytes), values, numpy)
