"""Blocks of the common GGUF types in torch: the bits that the `gguf` package decodes, several times as fast.

Quantised values lie in bytes, two or more in each. They are spread into bytes of their own eight at a time, as integers
of 64 bits, become float32 there and are scaled in place. Every product and every difference is rounded by itself, as
numpy rounds them. Layouts are those of ggml-quants.c in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loratool.layouts.ggml import TYPES
from loratool.lazy import Tensor, torch


def in_bytes(value: int) -> int:
    """A byte again in each of the eight of an integer."""
    return int.from_bytes(bytes([value]) * 8, "little", signed=True)


NIBBLES, ODD_BITS, PAIRS = map(in_bytes, (0x0F, 0x01, 0x03))


def words(data: Tensor) -> Tensor:
    """(blocks, bytes) of uint8 → (blocks, bytes / 8) of int64, in memory of its own where that is needed."""
    return data.contiguous().view(torch.int64)


def bytes_of(spread: Tensor, blocks: int, size: int) -> Tensor:
    """Integers of 64 bits, as the (blocks, n, size) of uint8 that they are."""
    return spread.view(torch.uint8).view(blocks, -1, size)


def half(data: Tensor) -> Tensor:
    """(blocks, 2n) of uint8 → (blocks, n) of float32: the float16 that they are."""
    return data.contiguous().view(torch.float16).float()


def q8_0(data: Tensor, out: Tensor) -> None:
    """A scale, and 32 integers of 8 bits."""
    values = out.view(len(data), 32).copy_(data[:, 2:].view(torch.int8))
    values.mul_(half(data[:, :2]))


def scales_and_minima(data: Tensor) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of Q4_K and Q5_K → scale and minimum of each 32 values, (blocks, 8, 1) of float32."""
    factors, packed = half(data[:, :4]), data[:, 4:16].view(-1, 3, 4)
    low, mixed = packed[:, :2] & 0x3F, packed[:, 2]
    high = (packed[:, :2] >> 2) & 0x30
    high[:, 0] |= mixed & 0x0F
    high[:, 1] |= mixed >> 4
    scaled = torch.cat([low, high], 2).float().mul_(factors[:, :, None])
    return scaled[:, 0, :, None], scaled[:, 1, :, None]


def q4_k(data: Tensor, out: Tensor) -> None:
    """Two factors of scales, 8 scales and minima of 6 bits, 256 integers of 4 bits."""
    scales, minima = scales_and_minima(data)
    packed, pairs = words(data), out.view(len(data), 4, 2, 32)
    for place, spread in enumerate((packed & NIBBLES, (packed >> 4) & NIBBLES)):
        pairs[:, :, place].copy_(spread.view(torch.uint8)[:, 16:].view(-1, 4, 32))
    out.view(len(data), 8, 32).mul_(scales).sub_(minima)


def q5_k(data: Tensor, out: Tensor) -> None:
    """As Q4_K, with a fifth bit of each integer, which come first."""
    scales, minima = scales_and_minima(data)
    packed = words(data)
    bits, packed = packed[:, None, 2:6], packed[:, 6:].view(-1, 4, 4)
    spread = torch.empty(len(data), 8, 4, dtype=torch.int64, device=data.device)
    for place in range(8):
        fifth = ((bits >> place) & ODD_BITS) << 4
        spread[:, place] = fifth[:, 0] | ((packed[:, place // 2] >> 4 * (place % 2)) & NIBBLES)
    values = out.view(len(data), 8, 32).copy_(bytes_of(spread, len(data), 32))
    values.mul_(scales).sub_(minima)


def q6_k(data: Tensor, out: Tensor) -> None:
    """256 integers of 4 bits, two more bits of each, 16 scales of 8 bits, a factor of scales."""
    low, bits = words(data[:, :128]).view(-1, 2, 2, 4), words(data[:, 128:192]).view(-1, 2, 1, 4)
    spread = torch.empty(len(data), 2, 2, 2, 4, dtype=torch.int64, device=data.device)
    torch.bitwise_and(low, NIBBLES, out=spread[:, :, 0])
    torch.bitwise_and(low >> 4, NIBBLES, out=spread[:, :, 1])
    quarters = spread.view(-1, 2, 4, 4)
    for place in range(4):
        quarters[:, :, place : place + 1] |= ((bits >> 2 * place) & PAIRS) << 4
    scales = data[:, 192:208].view(torch.int8).float().mul_(half(data[:, 208:]))
    integers = spread.view(torch.int8).view(-1, 16, 16).sub_(32)
    out.view(len(data), 16, 16).copy_(integers).mul_(scales[:, :, None])


DECODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {"Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def decoded(raw: Tensor, kind: str) -> Tensor:
    """(bytes,) of uint8, whole blocks of a type in `DECODERS` → (values,) of float32 on the same device."""
    packing, decode = TYPES[kind], DECODERS[kind]
    data = raw.view(-1, packing.nbytes)
    values = torch.empty(len(data) * packing.values, dtype=torch.float32, device=raw.device)
    decode(data, values)
    return values
