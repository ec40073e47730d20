"""What exact arithmetic gives: rational numbers, and the number of a dtype that is next to one."""

from __future__ import annotations

import struct
from fractions import Fraction

import torch

# by dtype: the struct formats of a number and of its bits, and the bits that bfloat16 lacks of a float32
FORMS = {
    torch.float64: ("<d", "<q", 0),
    torch.float32: ("<f", "<i", 0),
    torch.float16: ("<e", "<h", 0),
    torch.bfloat16: ("<f", "<i", 16),
}


def nearest_value(value: Fraction, dtype: torch.dtype) -> float:
    """The number of `dtype` next to `value`, ties to even: the best of those about what float64 gives."""
    form, whole, missing = FORMS[dtype]
    limit = torch.finfo(dtype).max
    about = float(min(abs(value), Fraction(limit)))
    bits = struct.unpack(whole, struct.pack(form, about))[0] >> missing
    tried = []
    for each in range(max(0, bits - 2), bits + 3):
        candidate = struct.unpack(form, struct.pack(whole, each << missing))[0]
        size = Fraction(candidate) if candidate < float("inf") else beyond(dtype)
        if candidate == candidate:
            tried.append((abs(size - abs(value)), each % 2, candidate))
    best: float = min(tried)[2]
    return -best if value < 0 else best


def beyond(dtype: torch.dtype) -> Fraction:
    """What infinity stands for in rounding: the number after the largest one, if the exponent went on."""
    about = torch.finfo(dtype)
    step = Fraction(2) ** (Fraction(about.max).numerator.bit_length() - 1) * Fraction(about.eps)
    return Fraction(about.max) + step


def exact_products(left: list[float], right: list[float], scale: float) -> Fraction:
    """The scaled sum of products."""
    return Fraction(scale) * sum((Fraction(a) * Fraction(b) for a, b in zip(left, right, strict=True)), Fraction(0))


def spelled(value: float) -> str:
    """A float so that −0 is not 0 and a NaN is a NaN."""
    return str(float(value))
