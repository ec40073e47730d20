"""Rounding up or down at random, each with the probability that makes the expected result the exact value.

The bits depend on the tensor's name and the element's place alone. Element i of a tensor (in the order of its bytes)
takes the 32-bit number R of half i mod 2, the lower one first, of word i div 2 of numpy's `Philox(key=K)`, Salmon et
al. 2011 (doi:10.1145/2063384.2063405); K is the first 16 bytes of the SHA-256 of the name in UTF-8 as two little-endian
64-bit numbers. With u, the step of the output's dtype at the exact value v, the result is the multiple of u whose size
is floor(|v|/u + (2R + 1)/2³³) · u, with the sign of v.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

from loratool.algebra.rational import exponent_of
from loratool.lazy import NDArray, Tensor, numpy, torch


def random_numbers(name: str, first: int, count: int) -> NDArray[numpy.uint32]:
    """The 32-bit numbers of elements `first` … `first + count` of a tensor."""
    key = numpy.frombuffer(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:16], "<u8")
    start = first // 8  # a step of the counter gives four words of 64 bits
    words = -(-(first + count) // 8) * 4 - start * 4
    halves = numpy.random.Philox(key=key, counter=start).random_raw(words).astype("<u8").view("<u4")
    return halves[first - start * 8 :][:count]


def round_at_random(
    values: Tensor, errors: Tensor, numbers: NDArray[numpy.uint32], dtype: torch.dtype, exact: Callable[[int], Fraction]
) -> Tensor:
    """Each value rounded up or down, as its number says.

    Args:
        values: (count,) in float64, finite.
        errors: (count,) how far each may be from the exact value.
        numbers: (count,) of the elements.
        dtype: of the result.
        exact: gives the exact value of an element; asked for where the error leaves it open.
    """
    shift = torch.from_numpy((2.0 * numbers + 1) / 2.0**33).to(values.device)
    size, about = values.abs(), torch.finfo(dtype)
    finest = int(math.log2(about.eps))
    lowest = int(math.log2(about.smallest_normal)) + finest

    def unit(sizes: Tensor) -> Tensor:
        return (torch.frexp(sizes).exponent.long() - 1 + finest).clamp(min=lowest)

    units = unit(size)
    scaled = torch.ldexp(size, -units)  # exact: a power of two
    slack = torch.ldexp(errors, -units) + (errors != 0) * 2.0**-40 + scaled * 2.0**-52
    counts = torch.floor(scaled + shift)
    unsure = (torch.floor(scaled + shift - slack) != counts) | (torch.floor(scaled + shift + slack) != counts)
    unsure |= (unit(size + errors) != units) | (unit((size - errors).clamp(min=0)) != units) | (size < errors)
    unsure &= size != 0
    unsure |= (size == 0) & (errors != 0)
    result = torch.copysign(torch.ldexp(counts, units), values)
    for at in torch.nonzero(unsure).flatten().tolist():
        result[at] = exactly(exact(at), int(numbers[at]), finest, lowest)
    return result.to(dtype)


def exactly(value: Fraction, number: int, finest: int, lowest: int) -> float:
    """The same for one exact value."""
    size = abs(value)
    if not size:
        return 0.0
    unit = max(exponent_of(size) + finest, lowest)
    count = math.floor(size / Fraction(2) ** unit + Fraction(2 * number + 1, 2**33))
    return math.copysign(math.ldexp(count, unit), value)
