"""How numpy rounds sums once to bfloat16 or float32, to the nearest number, ties to even."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from loratool.algebra.rounding import FEW, MIDDLING, Accumulator, has_exact_products, sums_of_few, two_sum
from loratool.lazy import NDArray, numpy

HALF = 0x8000  # of the last bit of a bfloat16, in the bits of a float32
SHORTEST = 16  # elements of the buffers of numpy
ZEROS = 29  # at the end of a float32 as a float64
LAST = 1 << 45  # the last bit of a bfloat16, in the bits of a float64


class Result(ABC):
    """A dtype that sums are rounded to, by its bits."""

    dtype: str  # as safetensors names it
    itemsize: int  # bytes
    last: int  # its last bit, in the bits of a float64

    @property
    def bits(self) -> type[Any]:
        """Whole numbers that hold the bits of one."""
        found: type[Any] = getattr(numpy, f"uint{8 * self.itemsize}")
        return found

    @property
    def work(self) -> type[Any]:
        """The dtype that sums are computed in: of twice the width."""
        found: type[Any] = getattr(numpy, f"float{16 * self.itemsize}")
        return found

    @abstractmethod
    def nearest(self, values: NDArray[Any], memory: NDArray[Any] | None = None) -> NDArray[Any]:
        """The bits of float32 rounded to the nearest: in `memory`, as many bytes, where it is given and needed."""

    def of_rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        """The bits of numbers in float64 that are rounded already: the first ones of a float32."""
        found: NDArray[Any] = values.astype(numpy.float32).view(numpy.uint32) >> (32 - 8 * self.itemsize)
        return found

    @abstractmethod
    def put_ends(
        self,
        upper: NDArray[Any],
        lengths: NDArray[Any],
        memory: NDArray[Any],
        after: NDArray[Any],
        differ: NDArray[Any],
    ) -> None:
        """Put the lower ends of intervals as they are rounded into `after`, and where the upper ones differ into `differ`.

        Args:
            upper: (n, width) upper ends in the working dtype, which are overwritten.
            lengths: (n, 1) of the intervals.
            memory: (n, width) of the working dtype.
            after: (n, width) of bits.
            differ: (n · width,) of bool.
        """


class Bfloat16(Result):
    """Bfloat16, of sums in float32."""

    dtype, itemsize, last = "BF16", 2, LAST

    def nearest(self, values: NDArray[Any], memory: NDArray[Any] | None = None) -> NDArray[Any]:
        return nearest_bits(values, None if memory is None else memory.view(numpy.uint32))

    def put_ends(
        self,
        upper: NDArray[Any],
        lengths: NDArray[Any],
        memory: NDArray[Any],
        after: NDArray[Any],
        differ: NDArray[Any],
    ) -> None:
        """A tie goes away from zero: it is an end, beyond which the exact value is."""
        subtract_by_rows(upper, lengths, memory)
        high, low = (each.reshape(-1).view(numpy.uint32) for each in (upper, memory))
        numpy.add(high, HALF, out=high)
        numpy.add(low, HALF, out=low)
        numpy.bitwise_xor(high, low, out=high)
        numpy.greater(high, 0xFFFF, out=differ)
        numpy.right_shift(low, 16, out=low)
        numpy.copyto(after, low.reshape(after.shape), casting="unsafe")


class Float32(Result):
    """Float32, of sums in float64."""

    dtype, itemsize, last = "F32", 4, 1 << 29

    def nearest(self, values: NDArray[Any], memory: NDArray[Any] | None = None) -> NDArray[Any]:  # noqa: ARG002
        return values.view(numpy.uint32)

    def put_ends(
        self,
        upper: NDArray[Any],
        lengths: NDArray[Any],
        memory: NDArray[Any],
        after: NDArray[Any],
        differ: NDArray[Any],
    ) -> None:
        high = memory.reshape(-1).view(numpy.float32)[: after.size].reshape(after.shape)
        numpy.copyto(high, upper, casting="same_kind")
        subtract_by_rows(upper, lengths, upper)
        numpy.copyto(after.view(numpy.float32), upper, casting="same_kind")
        numpy.not_equal(high.view(numpy.uint32), after, out=differ.reshape(after.shape))


RESULTS: dict[str, Result] = {each.dtype: each for each in (Bfloat16(), Float32())}


def subtract_by_rows(values: NDArray[Any], column: NDArray[Any], out: NDArray[Any]) -> None:
    """Put `values` − `column`, (n, width) and (n, 1), into `out`.

    Numpy fills a buffer with copies of a column's numbers, but for rows that are longer than its buffers.
    """
    before = numpy.setbufsize(SHORTEST)
    try:
        numpy.subtract(values, column, out=out)
    finally:
        numpy.setbufsize(before)


def nearest_bits(values: NDArray[Any], memory: NDArray[Any] | None = None) -> NDArray[Any]:
    """Float32 rounded to bfloat16, ties to even, as bits in uint32: in `memory` of the same shape, where it is given."""
    bits = values.view(numpy.uint32)
    found: NDArray[Any] = numpy.right_shift(bits, 16, out=memory)
    found &= 1
    found += HALF - 1
    found += bits
    found >>= 16
    return found


def rounded_once(values: NDArray[Any], last: int = LAST) -> NDArray[Any]:
    """Float64 rounded to the digits of bfloat16, or up to another `last` bit, ties to even, whatever the exponent."""
    bits = values.view(numpy.int64)
    return ((bits + (last // 2 - 1) + (bits // last & 1)) & -last).view(numpy.float64)


def exactly(
    weights: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: float, last: int = LAST
) -> NDArray[Any]:
    """Single sums of exact arithmetic rounded once, which may be ties; a NaN for what is not known.

    Args:
        weights: (count,) of W.
        left: (count, rank) of float32 or float64.
        right: (count, rank) of the same.
        scale: of the product.
        last: as `rounded_once` takes it.
    """
    start, left, right = (each.astype(numpy.float64, copy=False) for each in (weights, left, right))
    near = sums_of_few_digits(start, left, right, scale)
    others = numpy.flatnonzero(numpy.isnan(near))
    if len(others):
        near[others] = error_free_sums(start[others], left[others], right[others], scale, last)
    zero = numpy.copysign(0.0, numpy.where(weights == 0, weights, 0.0))  # but where W is −0, an exact zero is +0
    return numpy.where(near == 0, zero, rounded_once(near, last))


def sums_of_few_digits(start: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: float) -> NDArray[Any]:
    """Each `start` + scale · left · right where float64 holds it and all sums on the way; a NaN for any other.

    All that is added ends in `ZEROS` binary zeros, as float32 does, and as products of bfloat16 or of float16 do. The
    least is then a whole number of steps of float64 at its size times 2^ZEROS, and so is each of the others. What is
    less than 2^ZEROS times as large as the least has few enough of these steps for float64.
    """
    if not is_power_of_two(scale):
        return numpy.full_like(start, numpy.nan)
    terms = numpy.concatenate([(left * right * scale).T, start[None]])
    digits = numpy.bitwise_or.reduce(terms.view(numpy.int64))
    for factors in (left, right):  # or a product might be rounded to one of few digits
        digits |= numpy.bitwise_or.reduce(factors.T.view(numpy.int64))
    sizes = numpy.abs(terms)
    largest = sizes.sum(0)
    sizes[sizes == 0] = numpy.inf
    few = (digits & ((1 << ZEROS) - 1) == 0) & (largest <= sizes.min(0) * 2.0**ZEROS)
    return numpy.where(few, terms.sum(0), numpy.nan)


def error_free_sums(
    start: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: float, last: int
) -> NDArray[Any]:
    """Float64 that is rounded to the `last` bit as such sums are, which it may not hold; a NaN for what is not known."""
    term = left.T, right.T, scale
    if len(start) <= FEW and has_exact_products(term):
        (near, rest), lost = sums_of_few(start, [term]), numpy.zeros_like(start)
    else:
        sums = Accumulator(start)
        for one, other in zip(left.T, right.T, strict=True):
            sums.add_products(one, other, scale)
        (near, rest), lost = two_sum(sums.high, sums.low), sums.rest
    tie = near.view(numpy.int64) & (last - 1) == last // 2
    beyond = numpy.nextafter(near, numpy.copysign(numpy.inf, rest))
    return numpy.where(lost == 0, numpy.where(tie & (rest != 0), beyond, near), numpy.nan)


def roundings(rank: int, scale: float) -> int:
    """Roundings of a term in an element of scale · up @ down, with a constant added, at most.

    In whatever order r products and a constant are added, none of them is part of more than r sums: with its own rounding a
    product has r + 1. A power of two as the scale adds none, any other is rounded, and so is what it scales.
    """
    return rank + (1 if is_power_of_two(scale) else 3)


def is_power_of_two(number: float) -> bool:
    """Or its negative; such that float64 scales products of float32 by it without rounding."""
    return abs(math.frexp(number)[0]) == 0.5 and MIDDLING[0] < abs(number) < MIDDLING[1]
