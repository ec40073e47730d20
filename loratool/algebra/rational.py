"""Sums of products as rational numbers, and their rounding: what is left where error-free sums cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

from loratool.lazy import numpy, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sum_of(start: float, terms: Iterable[tuple[NDArray[numpy.float64], NDArray[numpy.float64], float]]) -> Fraction:
    """Start + Σ scale · left · right, exactly; the factors of n products are (n,) and (n,)."""
    exact = Fraction(start)
    for left, right, scale in terms:
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            exact += Fraction(one) * Fraction(other) * Fraction(scale)
    return exact


def exponent_of(size: Fraction) -> int:
    """That of a positive number: 2 ** exponent ≤ size < 2 ** (exponent + 1)."""
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent - (size < Fraction(2) ** exponent)


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """The number of `dtype` next to `value`, ties to even; infinite beyond the largest one."""
    size, about = abs(value), torch.finfo(dtype)
    if size == 0:
        return 0.0
    exponent = exponent_of(size)
    finest = int(math.log2(about.eps))  # the step at 1, as a power of two
    unit = max(exponent, int(math.log2(about.smallest_normal))) + finest
    count = round(size / Fraction(2) ** unit)  # ties to even
    rounded = math.inf if Fraction(count) * Fraction(2) ** unit > Fraction(about.max) else math.ldexp(count, unit)
    return -rounded if value < 0 else rounded
