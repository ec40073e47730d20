"""Updates changed a little, so that the rounded weight holds the whole of the update that is meant.

Where an update B A is small against the steps of a 16-bit dtype, rounding to the nearest takes a part of it away. What
the rounded weight holds of an update is E = round(W + update) − W. So the update is corrected:

1. it is scaled, so that a sample of the rows holds ⟨E, B A⟩ = ‖B A‖²;
2. all rows are looked at once, and what is missing, R = B A − E, is added as far as it has columns or rows in the
   update's own column or row space: P R + R Q − P R Q, P and Q being the orthogonal projections onto both;
3. it is scaled again.

Numpy does it, whatever computes the sums, in tiles and in an order of their own. So the result depends on nothing but
the inputs and the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, numpy
from loratool.merging.numpy_sums import ALONE, in_parts, multiply

Factors = tuple["NDArray[Any]", "NDArray[Any]"]
Read = Callable[["NDArray[Any]", int], None]
SAMPLED = 1 << 18  # elements of a weight that a scale is found on
RUN = 8  # rows of the sample that lie next to each other
FEW = 2  # of so many of its rows one is enough for the first scale: looking at all rows makes up for the error
TILE = 1 << 17  # elements of all rows that are looked at at a time: of fewer, the calls take longer than the arithmetic
MOST_STEPS = 8
ROUGHLY, CLOSE = 1e-2, 2e-3  # parts of the whole update that a scale may be off: less than the noise of the sample
SLOPES = 0.3, 3.0  # of the part that is kept against the scale, within which a step is computed
NEGLIGIBLE = 1e-10  # squared lengths in a factor, against the largest, of which nothing is corrected
CUT = {"BF16": 16, "F16": 13}  # digits of a float32 that are not the dtype's
SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24  # of float16


def compensated(up: NDArray[Any], down: NDArray[Any], scale: float, read: Read, dtype: str) -> Factors:
    """The factors of the corrected update, (rows, 2 · rank) and (2 · rank, width) of float32, whose scale is 1.

    Args:
        up: (rows, rank) of float32 or float64.
        down: (rank, width) of the same.
        scale: of their product.
        read: puts rows from some row on into (n, width) of float32: W, with all else that is added to it.
        dtype: of the output, a key of `CUT`.
    """
    up, down = balanced(up, down, scale)
    if not (up.any() and down.any()):
        return up, down
    with numpy.errstate(all="ignore"):  # of what is not finite
        return Compensation(up, down, read, dtype).corrected()


def memory_for(rows: int, width: int, rank: int) -> int:
    """Bytes that `compensated` takes at a time."""
    sampled, tile = min(rows * width, max(SAMPLED, RUN * width)), max(TILE, width)
    return 4 * (4 * sampled + 2 * tile) + 44 * rank * (rows + width)


class Compensation:
    """The update of one weight on its way."""

    def __init__(self, up: NDArray[Any], down: NDArray[Any], read: Read, dtype: str) -> None:
        self.up, self.down, self.read, self.dtype = up, down, read, dtype
        self.rank, self.width = down.shape
        self.together = max(1, TILE // self.width)  # rows that are looked at at a time, or fewer
        self.wide = up.astype(numpy.float64), numpy.ascontiguousarray(down.T, numpy.float64)
        self.grams = product(self.wide[0].T, self.wide[0]), product(self.wide[1].T, self.wide[1])
        self.inverses = tuple(numpy.linalg.pinv(gram, NEGLIGIBLE, hermitian=True) for gram in self.grams)

    def corrected(self) -> Factors:
        """The factors of the corrected update."""
        numbers = sample(numpy.flatnonzero(self.up.any(1)), max(RUN, SAMPLED // self.width))
        weight, meant = self.rows(numbers), self.changes(self.up[numbers], self.down)
        first = self.scale_for(weight[::FEW], meant[::FEW], meant[::FEW], ROUGHLY)
        lap("compensate")
        more, columns = self.missing(self.down * first)
        up = numpy.concatenate([self.up, more], 1)
        down = numpy.concatenate([self.down * first + columns.T, self.down], 0)
        down *= self.scale_for(weight, self.changes(up[numbers], down), meant, CLOSE)
        lap("compensate")
        return up, down

    def rows(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Rows of the weight for their numbers, which rise; 0 in place of what is not finite."""
        weight, at = numpy.empty((len(numbers), self.width), numpy.float32), 0
        for run in numpy.split(numbers, numpy.flatnonzero(numpy.diff(numbers) != 1) + 1):
            self.read(weight[at : at + len(run)], int(run[0]))
            at += len(run)
        weight[~numpy.isfinite(weight)] = 0
        return weight

    def changes(self, up: NDArray[Any], down: NDArray[Any]) -> NDArray[Any]:
        """The product, (n, width) of float32."""
        change = numpy.empty((len(up), self.width), numpy.float32)
        multiply(numpy.ascontiguousarray(up), in_parts(down, self.together), change)
        return change

    def scale_for(self, weight: NDArray[Any], change: NDArray[Any], meant: NDArray[Any], close: float) -> float:
        """By what to multiply `change`, so that the rounded rows hold all of what is meant along it, or nearly.

        It is the best of the scales that the secant method tries.
        """
        whole, memory = total(meant * meant), numpy.empty(change.shape, numpy.float32)
        if not whole:
            return 1.0
        scale, slope, best = 1.0, 1.0, (math.inf, 1.0)
        before: tuple[float, float] | None = None
        for _ in range(MOST_STEPS):
            numpy.multiply(change, numpy.float32(scale), out=memory)
            self.hold(memory, weight)
            memory *= meant
            kept = total(memory) / whole
            best = min(best, (abs(1 - kept), scale))
            if not abs(1 - kept) > close:
                break
            if before is not None:
                slope = min(max((kept - before[1]) / (scale - before[0]), SLOPES[0]), SLOPES[1])
            before, scale = (scale, kept), scale + (1 - kept) / slope
        return best[1]

    def missing(self, down: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What to add to up @ `down`, (rows, rank) times A and B times the transpose of (width, rank), both of float32.

        With X = E Aᵀ and Y = Eᵀ B of all rows, it is P R + R Q − P R Q without any matrix larger than those.
        """
        (up, turned), (left, right), (left_inverse, right_inverse) = self.wide, self.grams, self.inverses
        across, along = self.held(in_parts(down, self.together))
        both = product(turned.T, along)  # its transpose is Bᵀ E Aᵀ
        core = left_inverse @ (left @ right - both.T)
        more = product(product(up, right - core) - across, right_inverse)
        columns = product(product(turned, left) - along, left_inverse)
        return more.astype(numpy.float32), columns.astype(numpy.float32)

    def held(self, cut: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """E Aᵀ, (rows, rank), and Eᵀ B, (width, rank), of E that the rounded weight holds of up @ `cut`."""
        part, step = cut.shape[2], min(self.together, max(4, ALONE // cut[0].size))
        weight, sums = (numpy.empty((step, self.width), numpy.float32) for _ in range(2))
        turned = numpy.ascontiguousarray(self.down.T).reshape(-1, part, self.rank)
        across, along = numpy.empty_like(self.up), numpy.zeros_like(cut)
        for first in range(0, len(self.up), step):
            up = self.up[first : first + step]
            before, change = weight[: len(up)], sums[: len(up)]
            self.read(before, first)
            lap("decode")
            multiply(up, cut, change)
            self.hold(change, before)
            parts = change.reshape(len(up), -1, part).transpose(1, 0, 2)
            found = numpy.matmul(parts, turned).sum(0)
            if not numpy.isfinite(found).all():  # W, or what is beyond the range of the dtype; the merge will tell
                change[~numpy.isfinite(change)] = 0
                found = numpy.matmul(parts, turned).sum(0)
            across[first : first + step] = found
            along += numpy.matmul(up.T, parts)
            lap("compensate")
        return across, along.transpose(0, 2, 1).reshape(self.width, -1)

    def hold(self, change: NDArray[Any], weight: NDArray[Any]) -> None:
        """Put what the rounded rows hold of a change in its place."""
        change += weight
        round_to(self.dtype, change)
        change -= weight


def balanced(up: NDArray[Any], down: NDArray[Any], scale: float) -> Factors:
    """Factors of the same product with a scale of 1, in float32, times a power of two that makes them about as large."""
    up = up.astype(numpy.float64) * scale
    sizes = (math.frexp(float(numpy.abs(each).max(initial=0)))[1] for each in (up, down))
    shift = (next(sizes) - next(sizes)) // 2
    return numpy.ldexp(up, -shift).astype(numpy.float32), numpy.ldexp(down, shift).astype(numpy.float32)


def sample(numbers: NDArray[Any], wanted: int) -> NDArray[Any]:
    """About `wanted` of some numbers, evenly spread in runs; all where they are few."""
    if len(numbers) <= wanted:
        return numbers
    runs = wanted // RUN
    first = numpy.arange(runs) * (len(numbers) - RUN) // max(runs - 1, 1)
    chosen: NDArray[Any] = numbers[numpy.unique(first[:, None] + numpy.arange(RUN))]
    return chosen


def round_to(dtype: str, values: NDArray[Any]) -> None:
    """Round float32 to the digits of a dtype, ties away from zero, in place; nothing is too large."""
    bits, cut = values.view(numpy.uint32), CUT[dtype]
    if dtype == "F16":
        places = numpy.flatnonzero(numpy.abs(values) < SMALLEST_NORMAL)
        small = numpy.rint(values.reshape(-1)[places] / SMALLEST) * SMALLEST
    bits += numpy.uint32(1 << cut - 1)
    bits &= numpy.uint32((1 << 32) - (1 << cut))
    if dtype == "F16":
        values.reshape(-1)[places] = small


def total(values: NDArray[Any]) -> float:
    """The sum of a matrix."""
    return float(values.sum(1).sum(dtype=numpy.float64))


def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """The product of matrices in float64 on this thread: by some rows at a time, or, where there are few, by some of what is summed."""
    rows, terms = left.shape
    if rows > terms:
        step = max(16, ALONE // max(1, right.size))
        return numpy.concatenate([left[at : at + step] @ right for at in range(0, rows, step)])
    step = max(16, ALONE // max(1, rows * right.shape[1]))
    found: NDArray[Any] = sum(
        (left[:, at : at + step] @ right[at : at + step] for at in range(0, terms, step)), numpy.float64(0)
    )
    return found
