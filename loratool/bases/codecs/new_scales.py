"""New scales and zero points for blocks of values, as the tools that quantise work them out.

A scale is the largest magnitude over half the range of the numbers (`calculate_qparams` of compressed-tensors), rounded
to the dtype that scales have. Powers of two are those of `generate_mx_scales`: that of the largest magnitude, rounded up
from 1.75 of it, less the exponent of the largest number.
"""

from __future__ import annotations

import math

from loratool.bases.codecs.bit_fields import packed
from loratool.bases.codecs.numbers import Numbers
from loratool.lazy import Tensor, torch

LEAST_E4M3, GREATEST_E4M3 = 2.0**-9, 448.0


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored, in a dtype of floats; those of blocks of zeros are 1."""
    scales = torch.where(scales > 0, scales, 1.0)
    if dtype == torch.float8_e4m3fn:
        return scales.clamp(LEAST_E4M3, GREATEST_E4M3).to(dtype)
    limits = torch.finfo(dtype)
    return scales.clamp(limits.tiny, limits.max).to(dtype)


def stored_powers(largest: Tensor, numbers: Numbers) -> Tensor:
    """E8M0 bytes for blocks with these largest magnitudes."""
    fraction, exponent = torch.frexp(largest)  # largest = fraction · 2^exponent, fraction in [1/2, 1)
    exponent = exponent - 1 + (fraction >= 0.875).int() - math.floor(math.log2(numbers.greatest))
    return torch.where(largest > 0, exponent + 127, 127).clamp(0, 254).to(torch.uint8)


def new_second(own: Tensor, largest: Tensor, numbers: Numbers, divides: bool) -> Tensor:
    """The scale of each matrix, (n,) of float32: its own where the scales of blocks fit beside it, else a new one.

    Layers that are fused should have the same one, so it stays wherever it can. `largest` is that of each matrix.
    """
    needed = largest / numbers.span * own if divides else largest / numbers.span / own
    most = GREATEST_E4M3 * numbers.span
    new = most / largest if divides else largest / most
    return torch.where(needed > GREATEST_E4M3, new, own)


def zero_points(smallest: Tensor, scales: Tensor, numbers: Numbers) -> Tensor:
    """What stands for 0 in blocks whose smallest value, at most 0, is the least number."""
    return (numbers.least - smallest / scales).round_().clamp_(numbers.least, numbers.greatest)


def packed_zeros(zeros: Tensor, bits: int) -> Tensor:
    """(matrices, rows, blocks) of whole numbers → (matrices, ⌈rows · bits/32⌉, blocks) of int32, packed along rows."""
    unsigned = (zeros + (1 << bits - 1)).to(torch.uint8).mT.contiguous()
    return packed(unsigned.view(-1, zeros.shape[1]), bits).view(len(zeros), zeros.shape[2], -1).mT.contiguous()
