"""What the bytes of packed values stand for, as float32: most of it is looked up.

One look-up gives two values, as the bits of one number of 64 bits: pairs of 4-bit values by their byte, the low nibble
first, and pairs of 8-bit floats by their two bytes. That is two to four times as quick on a CPU as arithmetic.

E2M1: sign, 2 bits of exponent, 1 of mantissa (OCP Microscaling Formats 1.0, FP4). E4M3 has no infinities, and S.1111.111
is NaN (FP8 E4M3 of the same). E8M0 is a power of two, 2^(byte − 127), and 255 is NaN.
"""

from __future__ import annotations

import math
from functools import cache

from loratool.lazy import Tensor, torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
OFFSET_INT4 = tuple(float(code - 8) for code in range(16))  # unsigned codes, 8 stands for 0
SIGNED_INT4 = tuple(float(code - 16 * (code > 7)) for code in range(16))  # two's complement
# E2M3, 6 bits: sign, 2 bits of exponent, 3 of mantissa
MAGNITUDES_E2M3 = tuple(
    [step / 8 for step in range(8)] + [(1 + step / 8) * 2**e for e in range(3) for step in range(8)]
)
E2M3 = (*MAGNITUDES_E2M3, *(-value for value in MAGNITUDES_E2M3))


def nibbles(packed: Tensor, values: tuple[float, ...]) -> Tensor:
    """(…, n) of uint8 → (…, 2n) of float32: `values` by nibble, the low nibble first."""
    found = pairs(values, packed.device).index_select(0, packed.reshape(-1).int())
    return found.view(torch.float32).view(*packed.shape[:-1], -1)


def e4m3(packed: Tensor) -> Tensor:
    """(…) of uint8 → the same shape of float32."""
    if packed.device.type != "cpu" or packed.numel() % 2 or not packed.is_contiguous():
        return packed.view(torch.float8_e4m3fn).float()
    twos = packed.view(-1).view(torch.int16).int().bitwise_and_(0xFFFF)
    return pairs_of_e4m3().index_select(0, twos).view(torch.float32).view(packed.shape)


def e8m0(packed: Tensor) -> Tensor:
    """(…) of uint8 → the same shape of float32; infinity for 255."""
    return powers(packed.device).index_select(0, packed.reshape(-1).int()).view(packed.shape)


def by_rows(packed: Tensor) -> Tensor:
    """(rows, n) of uint8, two columns a byte → (⌈rows/2⌉, 2n), two rows a byte; the low nibble is the first one."""
    packed = torch.nn.functional.pad(packed, (0, 0, 0, len(packed) % 2))
    return torch.stack(regrouped(packed[::2], packed[1::2]), 2).view(len(packed) // 2, -1)


def by_columns(packed: Tensor) -> Tensor:
    """(n, columns) of uint8, two rows a byte → (2n, ⌈columns/2⌉), two columns a byte; the low nibble is the first one."""
    packed = torch.nn.functional.pad(packed, (0, packed.shape[1] % 2))
    return torch.stack(regrouped(packed[:, ::2], packed[:, 1::2]), 1).view(2 * len(packed), -1)


def regrouped(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The low nibbles of two tensors of uint8 as one, and their high nibbles as one."""
    return (first & 15) | (second << 4), (first >> 4) | (second & 0xF0)


def packed_nibbles(codes: Tensor) -> Tensor:
    """(n, columns) of uint8 → (n, ⌈columns/2⌉), two columns a byte; the low nibble is the first one."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def looked_up(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """(…) of uint8 → the same shape of float32: `values` by code."""
    return torch.tensor(values, device=codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(256,) of int64: the bits of the two float32 that a byte stands for."""
    each = torch.tensor(values, dtype=torch.float32)
    return torch.stack([each.repeat(16), each.repeat_interleave(16)], 1).view(torch.int64).flatten().to(device)


@cache
def pairs_of_e4m3() -> Tensor:
    """(65536,) of int64: the bits of the two float32 that two bytes stand for."""
    each = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.stack([each.repeat(256), each.repeat_interleave(256)], 1).view(torch.int64).flatten()


@cache
def powers(device: torch.device) -> Tensor:
    """(256,) of float32: the powers of two by their E8M0 byte."""
    exact = [math.ldexp(1.0, byte - 127) for byte in range(255)]  # 2^-127 is a subnormal of float32
    return torch.tensor([*exact, math.inf], dtype=torch.float32, device=device)
