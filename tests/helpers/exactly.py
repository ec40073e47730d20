"""What exact arithmetic gives: rational numbers, and the number of a dtype that is next to one."""

from __future__ import annotations

from fractions import Fraction

import torch


def nearest_value(value: Fraction, dtype: torch.dtype) -> float:
    """The number of `dtype` next to `value`, ties to even: the best of those about what float64 gives."""
    try:
        about = float(value)
    except OverflowError:
        about = float("inf")
    guess = torch.tensor([about], dtype=torch.float64).abs().to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = int(guess.view(integers))
    tried = []
    for each in range(max(0, bits - 2), bits + 3):
        candidate = float(torch.tensor([each], dtype=integers).view(dtype).double())
        size = Fraction(candidate) if candidate < float("inf") else beyond(dtype)
        if candidate == candidate:
            tried.append((abs(size - abs(value)), each % 2, candidate))
    best = min(tried)[2]
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
