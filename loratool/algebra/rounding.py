"""Numbers of float64 rounded once, and exact sums of products: what is left when float64 cannot tell which way to round.

Error-free sums and products are Knuth's TwoSum and Dekker's product (Dekker 1971, doi:10.1007/BF01397083); rounding by
way of float32 without rounding twice is rounding to odd (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.lazy import Tensor, numpy, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[numpy.float64]

Term = tuple["Numbers", "Numbers", float]  # (n, count) left, (n, count) right, scale

INTEGERS = {8: "int64", 4: "int32", 2: "int16", 1: "uint8"}  # by bytes
SPLITTER = 2.0**27 + 1  # cuts a float64 into two halves of 26 bits
FAR = 2.0**-26  # of a float32's size: less than half of its step
FEW = 64  # elements for which Python's own exact sums take less time than numpy's calls
MIDDLING = 2.0**-200, 2.0**200  # sizes of float32 and of scales whose products float64 holds
SAFE = 2.0**-900, 2.0**900  # sizes of products that are error-free: nothing near overflow or underflow


def bits_of(values: Tensor) -> Tensor:
    """The numbers' bits as integers, in the same memory."""
    integers: torch.dtype = getattr(torch, INTEGERS[values.element_size()])
    return values.view(integers)


def tie_of(dtype: torch.dtype) -> int:
    """The last bits of a float32 that is half-way between two of a 16-bit dtype, if it is `alike_from` or more."""
    return 0x8000 if dtype == torch.bfloat16 else 0x1000


def alike_from(dtype: torch.dtype) -> float:
    """The size from which on that is true: bfloat16 has the exponents of float32, and float16 has fewer.

    It is never 0: a sum of 0 may have either sign.
    """
    return 2.0**-149 if dtype == torch.bfloat16 else 2.0**-14


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in another floating dtype, each the number next to it, ties to even.

    Torch rounds float64 to a 16-bit dtype by way of float32, and so twice; everything else it rounds once.
    """
    if values.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.to(torch.float32)
    back, bits = single.double(), bits_of(single)
    away = torch.where(values.abs() > back.abs(), 1, -1).to(torch.int32)
    cut = (back != values) & (bits & 1 == 0) & values.isfinite()
    return (bits + away * cut).view(torch.float32).to(dtype)


def two_sum(one: Numbers, other: Numbers) -> tuple[Numbers, ...]:
    """The sum, and what rounding took from it."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)


def two_product(one: Numbers, other: Numbers) -> tuple[Numbers, ...]:
    """The product, and what rounding took from it; right where the product lies in `SAFE`."""
    product = one * other
    high, low = split(one)
    top, bottom = split(other)
    return product, low * bottom - (((product - high * top) - low * top) - high * bottom)


def split(values: Numbers) -> tuple[Numbers, Numbers]:
    """Each number as the sum of two whose significands have half the bits."""
    scaled = values * SPLITTER
    high = scaled - (scaled - values)
    return high, values - high


class Accumulator:
    """Sums that lose nothing: each is high + low, give or take `rest`, which is 0 where the sum is exact."""

    def __init__(self, start: Numbers) -> None:
        self.high, self.low = start.copy(), numpy.zeros_like(start)
        self.rest = numpy.zeros_like(start)

    def add(self, values: Numbers) -> None:
        self.high, error = two_sum(self.high, values)
        self.low, lost = two_sum(self.low, error)
        self.rest += numpy.abs(lost)

    def add_products(self, left: Numbers, right: Numbers, scale: float) -> None:
        """Add scale · left · right."""
        factor = numpy.full_like(left, scale)
        for part in two_product(left, right):
            for each in two_product(part, factor) if part.any() else ():
                if each.any():
                    self.add(each)
        size = numpy.abs(left * right)
        nothing = (left == 0) | (right == 0) | (scale == 0)
        scaled = size * abs(scale)
        inside = (size > SAFE[0]) & (size < SAFE[1]) & (scaled > SAFE[0]) & (scaled < SAFE[1])
        for factors in (numpy.abs(left), numpy.abs(right)):
            inside &= factors < SAFE[1]
        self.rest[~(nothing | inside)] = math.inf


def exact_sums(start: Numbers, terms: Sequence[Term], dtype: torch.dtype) -> Tensor:
    """Each `start` + Σ scale · left · right of exact arithmetic, rounded once to `dtype`, ties to even.

    An exact zero is +0, but where `start` is −0 it stays −0.

    Args:
        start: (count,), finite.
        terms: (n, count) factors of n products each, and their scale.
        dtype: of the result.
    """
    with numpy.errstate(all="ignore"):  # what overflows is found and left to fractions
        if 0 < len(start) <= FEW and numpy.abs(start).max() < SAFE[1] and all(map(has_exact_products, terms)):
            (high, low), rest = sums_of_few(start, terms), numpy.zeros_like(start)
        else:
            sums = Accumulator(start)
            for left, right, scale in terms:
                for one, other in zip(left, right, strict=True):
                    sums.add_products(one, other, scale)
            high, low = two_sum(sums.high, sums.low)
            rest = sums.rest * (1 + 2.0**-40)
        rounded, sure = decided(high, low, rest, dtype)
    rounded[torch.from_numpy((high == 0) & (start == 0) & numpy.signbit(start))] = -0.0
    for at in numpy.flatnonzero(~sure).tolist():
        from loratool.algebra.rational import nearest, sum_of

        exact = sum_of(float(start[at]), ((left[:, at], right[:, at], scale) for left, right, scale in terms))
        negative = exact < 0 or (exact == 0 == start[at] and numpy.signbit(start[at]))
        rounded[at] = nearest(exact, dtype) or math.copysign(0.0, -1.0 if negative else 1.0)
    return rounded


def has_exact_products(term: Term) -> bool:
    """Whether float64 holds each scale · left · right: factors are float32 of middling sizes, the scale a power of two."""
    left, right, scale = term
    lowest, highest = MIDDLING
    for each in (left, right, numpy.array([scale])):
        size = numpy.abs(each)
        if not (((size == 0) | ((size > lowest) & (size < highest))) & (each == each.astype(numpy.float32))).all():
            return False
    return abs(math.frexp(scale)[0]) == 0.5


def sums_of_few(start: Numbers, terms: Sequence[Term]) -> tuple[Numbers, Numbers]:
    """`exact_sums` as the next float64 and what that is off by, for which few elements make too little work for numpy."""
    rows = [start[None], *(left * right * scale for left, right, scale in terms)]
    every = numpy.concatenate(rows).T.tolist()
    high = [math.fsum(numbers) for numbers in every]
    low = [math.fsum((*numbers, -sum_)) for numbers, sum_ in zip(every, high, strict=True)]
    return numpy.array(high) + 0.0, numpy.array(low)


def decided(high: Numbers, low: Numbers, rest: Numbers, dtype: torch.dtype) -> tuple[Tensor, NDArray[numpy.bool_]]:
    """The sums high + low ± rest rounded to `dtype`, and where that is sure; |low| is at most half a step of `high`."""
    near = round_once(torch.from_numpy(high), dtype)
    step = numpy.spacing(numpy.abs(high))
    if dtype == torch.float64:
        return near, (rest == 0) | (numpy.abs(low) + rest < step / 4)
    size, values = numpy.abs(high), near.double().abs().numpy()
    beyond = size - values  # exact, for both are multiples of `step`
    bits = bits_of(near.abs())
    next_one = bits + torch.from_numpy(numpy.sign(beyond)).to(bits.dtype)
    other = next_one.view(dtype).double().numpy()
    tie = (beyond != 0) & (other - size == beyond)
    outward = low * numpy.sign(high)
    chosen = torch.where(torch.from_numpy(outward > 0), torch.maximum(bits, next_one), torch.minimum(bits, next_one))
    moved = torch.from_numpy(tie & (low != 0))
    result = torch.where(moved, torch.copysign(chosen.view(dtype), torch.from_numpy(high).to(dtype)), near)
    sure = numpy.where(tie, (rest == 0) | (numpy.abs(low) > rest), rest < step / 4)
    return result, sure & numpy.isfinite(values)
