"""Weights of bfloat16 to which one product is added, compared by numpy: importing torch takes longer than most of them.

The rule is that of `quick`: a sum in float32 that is rounded is the formula's once rounded but next to a tie, and elements
that differ are decided in float64. What is not settled so is left to torch; of a model that is as it should be, that is
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import StoredTensor
from loratool.algebra.rounding import Accumulator, two_sum
from loratool.algebra.updates.additive import LowRank
from loratool.bases.weights import Plain
from loratool.lazy import NDArray, numpy
from loratool.merging.addends import ALL, GENEROUS, ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratool.files.open_sources import OpenSources
    from loratool.verifying.pairing import Pair

MOST = 1 << 31  # elements in all: of more of them, the import of torch is a small part of the time
MANY = 64  # where more than one of so many elements differs, torch finds out what they are
TILE = 1 << 18  # elements that are computed at a time: of fewer, the calls take longer than the arithmetic
ALONE = (
    1 << 18
)  # multiplications of a product that OpenBLAS does on the calling thread: more of those are there already
WORKABLE = 2.0**-60, 2.0**60  # sizes of factors and scales that float32 computes with
LARGEST = 2.0**120  # of what is added, so that no sum is near the largest number
FACTORS = ("F32", "F16", "BF16")
HALF = 0x8000  # of the last bit of a bfloat16, in the bits of a float32
LAST = 1 << 45  # the last bit of a bfloat16, in the bits of a float64
SMALLEST = 2.0**-126  # below it a bfloat16 has fewer digits
TOGETHER = 1 << 12  # elements that are summed exactly at a time


def suffices(pairs: Sequence[Pair], device: str) -> bool:
    """Whether numpy can compare all of some pairs, and there is no more of them than it is good for."""
    few = sum(pair.span.placed.elements for pair in pairs) <= MOST
    return few and device in ("auto", "cpu") and all(map(suits, pairs))


def suits(pair: Pair) -> bool:
    """Whether a pair is a weight and its edit of the most common kind."""
    span, theirs = pair.span, pair.theirs
    if len(span.edits) != 1 or not isinstance(span.weight, Plain) or not isinstance(theirs, Plain):
        return False
    (edit,) = span.edits
    update = edit.update
    if not isinstance(update, LowRank) or edit.shared or edit.columns != ALL:
        return False
    up: object = update.up  # tensors are annotated, and files are planned with
    down: object = update.down
    if not isinstance(up, StoredTensor) or not isinstance(down, StoredTensor):
        return False
    stored = up.info.dtype in FACTORS and down.info.dtype in FACTORS
    of_bfloat16 = span.weight.info.dtype == span.placed.dtype == theirs.info.dtype == "BF16"
    whole = (edit.first_row, edit.update_row, edit.rows, pair.rows) == (0, 0, span.rows, span.rows)
    fits = (up.shape, down.shape) == (
        (span.rows, update.rank),
        (update.rank, span.width),
    ) and theirs.shape == span.shape
    return stored and of_bfloat16 and whole and fits


@dataclass(frozen=True)
class Added:
    """scale · up @ down."""

    up: NDArray[Any]  # (rows, rank) of float32
    down: NDArray[Any]  # (rank, width) of float32
    scale: float

    @classmethod
    def by(cls, pair: Pair) -> Added:
        """What the one edit of a pair adds."""
        (edit,) = pair.span.edits
        update: Any = edit.update
        return cls(values_of(update.up), values_of(update.down), update.scale * edit.strength)

    @cached_property
    def is_workable(self) -> bool:
        """Whether float32 computes with its numbers."""
        sizes = [abs(self.scale), *(float(numpy.abs(each).max(initial=0)) for each in (self.up, self.down))]
        return all(size == 0 or WORKABLE[0] < size < WORKABLE[1] for size in sizes) and self.reach < LARGEST

    @cached_property
    def cut(self) -> NDArray[Any]:
        """(parts, rank, columns): scale · down, cut into parts of columns."""
        rank, width = self.down.shape
        columns = max(32, ALONE // max(1, rank * max(1, TILE // width)))
        columns = gcd(width, 1 << columns.bit_length() - 1)
        step = columns if columns >= 16 else width  # an odd one stays whole
        scaled = (self.down * numpy.float32(self.scale)).reshape(rank, -1, step)
        parts: NDArray[Any] = numpy.ascontiguousarray(scaled.transpose(1, 0, 2))
        return parts

    @cached_property
    def reach(self) -> float:
        """No sum of the sizes of an element's products is larger."""
        lengths = [
            numpy.linalg.norm(each.astype(numpy.float64), axis=axis) for axis, each in enumerate((self.down, self.up))
        ]
        return float(lengths[0].max(initial=0) * lengths[1].max(initial=0)) * abs(self.scale) * GENEROUS


class Tile:
    """Memory for some rows of a width: W and W' are read into it, and W + ΔW is computed there."""

    def __init__(self, width: int) -> None:
        self.rows = max(1, TILE // max(1, width))
        self.width = width
        self.lanes = 1 if width % 4 else 4  # elements that are compared at a time
        shape = self.rows, width
        self.stored, self.theirs, self.rounded = (numpy.empty(shape, numpy.uint16) for _ in range(3))
        self.weight, self.sums = (numpy.empty(shape, numpy.float32) for _ in range(2))

    def settled(self, pair: Pair, added: Added, first: int, count: int, sources: OpenSources) -> bool:
        """Whether all elements of some rows are found to be the formula's."""
        odd: list[tuple[NDArray[Any], ...]] = []
        with numpy.errstate(all="ignore"):  # of what is not finite
            for at in range(first, first + count, self.rows):
                rows = min(self.rows, first + count - at)
                self.compute(pair, added, at, rows, sources)
                odd.append(self.unequal(at, rows))
                if len(odd[-1][0]) * MANY > rows * self.width:
                    return False
            places, weights, ours, theirs = (numpy.concatenate(each) for each in zip(*odd, strict=True))
            places = places[:, None] * self.lanes + numpy.arange(self.lanes)
            some = ours != theirs
            return are_sums(added, divmod(places[some], self.width), weights[some], widened(theirs[some]))

    def compute(self, pair: Pair, added: Added, first: int, count: int, sources: OpenSources) -> None:
        """Read some rows, and put their sums as they are rounded into `rounded`; a tie goes away from zero."""
        for weight, into in ((pair.span.weight, self.stored), (pair.theirs, self.theirs)):
            assert isinstance(weight, Plain)
            weight.read(first * self.width * 2, into[:count].data.cast("B"), sources)
        weights, sums = self.weight[:count], self.sums[:count]
        widen(self.stored[:count], weights)
        parts = sums.reshape(count, len(added.cut), -1).transpose(1, 0, 2)
        numpy.matmul(added.up[first : first + count], added.cut, out=parts)
        numpy.add(sums, weights, out=sums)
        bits = sums.view(numpy.uint32)
        numpy.add(bits, HALF, out=bits)
        numpy.right_shift(bits, 16, out=bits)
        numpy.copyto(self.rounded[:count], bits, casting="unsafe")

    def unequal(self, first: int, count: int) -> tuple[NDArray[Any], ...]:
        """Elements in groups of `lanes` that have unequal ones: the numbers of those, (n,), W, W + ΔW and W', (n, lanes)."""
        kind = numpy.uint64 if self.lanes == 4 else numpy.uint16
        ours, theirs = (each[:count].reshape(-1).view(kind) for each in (self.rounded, self.theirs))
        found = numpy.flatnonzero(ours != theirs)
        every = (each[:count].reshape(-1, self.lanes)[found] for each in (self.weight, self.rounded, self.theirs))
        return found + first * self.width // self.lanes, *every


def are_sums(added: Added, places: tuple[Any, Any], weights: NDArray[Any], theirs: NDArray[Any]) -> bool:
    """Whether single elements are W + ΔW rounded once to bfloat16, for sure.

    Args:
        added: ΔW.
        places: their rows and columns, (count,) each.
        weights: (count,) of W.
        theirs: (count,) of the merged model.
    """
    rows, columns = places
    left, right = added.up[rows].astype(numpy.float64), added.down[:, columns].T.astype(numpy.float64)
    values = (left * right).sum(1) * added.scale + weights
    terms = len(added.down) + 8
    margins = (abs(weights) + abs(values) + added.reach) * (terms * ROUNDOFF[8] * GENEROUS)
    low, high = (rounded_once(each) for each in (values - margins, values + margins))
    open_ones = numpy.flatnonzero(low != high)
    for at in range(0, len(open_ones), TOGETHER):
        some = open_ones[at : at + TOGETHER]
        low[some] = exactly(weights[some], left[some], right[some], added.scale)
    sound = numpy.isfinite(theirs) & (abs(theirs) >= 2 * SMALLEST)
    return bool((sound & (low == theirs)).all())


def exactly(weights: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: float) -> NDArray[Any]:
    """Single sums of exact arithmetic rounded once, which may be ties; a NaN for what is not known.

    Args:
        weights: (count,) of W.
        left: (count, rank) of float64.
        right: (count, rank) of float64.
        scale: of the product.
    """
    sums = Accumulator(weights.astype(numpy.float64))
    for one, other in zip(left.T, right.T, strict=True):
        sums.add_products(one, other, scale)
    near, rest = two_sum(sums.high, sums.low)
    tie = near.view(numpy.int64) & (LAST - 1) == LAST // 2
    beside = numpy.nextafter(near, numpy.copysign(numpy.inf, rest))
    return numpy.where(sums.rest == 0, rounded_once(numpy.where(tie & (rest != 0), beside, near)), numpy.nan)


def rounded_once(values: NDArray[Any]) -> NDArray[Any]:
    """Float64 rounded to the digits of bfloat16, ties to even, whatever the exponent."""
    bits = values.view(numpy.int64)
    return ((bits + (LAST // 2 - 1) + (bits // LAST & 1)) & -LAST).view(numpy.float64)


def values_of(tensor: StoredTensor) -> NDArray[Any]:
    """A factor in float32."""
    raw = bytearray(tensor.info.nbytes)
    tensor.read(0, memoryview(raw))
    stored = numpy.frombuffer(
        raw, {"F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}[tensor.info.dtype]
    )
    values = widened(stored) if tensor.info.dtype == "BF16" else stored.astype(numpy.float32)
    values = values.reshape(tensor.info.shape)
    return numpy.ascontiguousarray(values.T) if tensor.transposed else values


def widened(stored: NDArray[Any]) -> NDArray[Any]:
    """The bits of bfloat16 as float32."""
    values = numpy.empty(stored.shape, numpy.float32)
    widen(stored, values)
    return values


def widen(stored: NDArray[Any], into: NDArray[Any]) -> None:
    """Put the bits of bfloat16 into float32: whole numbers are shifted, for numpy is slow with every other half."""
    bits = into.view(numpy.uint32)
    numpy.copyto(bits, stored)
    numpy.left_shift(bits, 16, out=bits)
