"""Weights of bfloat16 to which one product is added, compared by numpy: importing torch takes longer than most of them.

The rule is that of `quick`: a sum in float32 that is rounded is the formula's once rounded but next to a tie, and elements
that differ are decided in float64. What is not settled so is left to torch; of a model that is as it should be, that is
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratool.bases.weights import Plain
from loratool.data import dataclass
from loratool.lazy import NDArray, numpy
from loratool.merging import numpy_sums
from loratool.merging.addends import GENEROUS, ROUNDOFF
from loratool.merging.numpy_rounding import HALF, exactly, rounded_once
from loratool.merging.numpy_sums import Added, in_parts, multiply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratool.bases.edits import Edit
    from loratool.bases.weights import StoredWeight
    from loratool.files.open_sources import OpenSources
    from loratool.verifying.pairing import Pair

MOST = 1 << 31  # elements in all: of more of them, the import of torch is a small part of the time
MANY = 64  # where more than one of so many elements differs, torch finds out what they are
TILE = 1 << 18  # elements that are computed at a time: of fewer, the calls take longer than the arithmetic
SMALLEST = 2.0**-126  # below it a bfloat16 has fewer digits
TOGETHER = 1 << 12  # elements that are summed exactly at a time
GROUP = 4  # elements that are compared at a time
SECOND = 0xFFFF0000  # the second of two elements in one word


def suffices(pairs: Sequence[Pair], device: str) -> bool:
    """Whether numpy can compare all of some pairs, and there is no more of them than it is good for."""
    few = sum(pair.span.placed.elements for pair in pairs) <= MOST
    return few and device in ("auto", "cpu") and all(map(suits, pairs))


def suits(pair: Pair) -> bool:
    """Whether a pair is a weight and its edit of the most common kind, both as bfloat16."""
    span, theirs = pair.span, pair.theirs
    if not isinstance(span.weight, Plain) or not isinstance(theirs, Plain) or not numpy_sums.suits(span):
        return False
    of_bfloat16 = span.weight.info.dtype == theirs.info.dtype == "BF16"
    return of_bfloat16 and pair.rows == span.rows and theirs.shape == span.shape


@dataclass(frozen=True)
class Halved:
    """ΔW, ready for the two halves of a `Tile`."""

    added: Added
    down: tuple[NDArray[Any], NDArray[Any]]  # of all first and all second elements: (parts, rank, columns) of float32

    @classmethod
    def by(cls, edit: Edit) -> Halved:
        """What an edit adds."""
        added = Added.by(edit, numpy.float32)
        rank, width = added.down.shape
        scaled = numpy.zeros((rank, lanes_of(width)), numpy.float32)
        numpy.multiply(added.down, added.scale, out=scaled[:, :width], casting="same_kind")
        first, second = (in_parts(scaled[:, each::2], rows_of(width)) for each in (0, 1))
        return cls(added, (first, second))


class Tile:
    """Memory for some rows of a width: W and W' are read into it, and W + ΔW is computed there.

    Two elements that are neighbours are one word of 32 bits: a shift makes a float32 of the first one, and a mask of
    the second. One half of the memory holds all first elements, the other one all second ones, and that is the order in
    which the product gives them. Numpy is slow with 16 bits in every other place, and fast with words.
    """

    def __init__(self, width: int) -> None:
        self.rows, self.width, self.lanes = rows_of(width), width, lanes_of(width)
        words = self.rows, self.lanes // 2
        self.stored, self.theirs = (numpy.zeros(words, numpy.uint32) for _ in range(2))  # what is no element stays 0
        self.weight, self.sums = (numpy.empty((2, *words), numpy.float32) for _ in range(2))
        self.differ = numpy.empty(self.stored.size // 2, numpy.bool_)

    def settled(self, pair: Pair, halved: Halved, first: int, count: int, sources: OpenSources) -> bool:
        """Whether all elements of some rows are found to be the formula's."""
        odd: list[tuple[NDArray[Any], ...]] = []
        with numpy.errstate(all="ignore"):  # of what is not finite
            for at in range(first, first + count, self.rows):
                rows = min(self.rows, first + count - at)
                self.read(pair.span.weight, at, self.stored[:rows], sources)
                self.read(pair.theirs, at, self.theirs[:rows], sources)
                self.compute(halved, at, rows)
                odd.append(self.unequal(at, rows))
                if len(odd[-1][0]) * MANY > rows * self.width:
                    return False
            places, *values = (numpy.concatenate(each) for each in zip(*odd, strict=True))
            weights, ours, theirs = (each.view(numpy.uint16) for each in values)
            some = numpy.flatnonzero(ours != theirs)
            where = divmod(places[some // GROUP] * GROUP + some % GROUP, self.lanes)
            return are_sums(halved.added, where, widened(weights[some]), widened(theirs[some]))

    def read(self, weight: StoredWeight, first: int, into: NDArray[Any], sources: OpenSources) -> None:
        """Put rows of a weight from `first` on into words, (n, lanes / 2)."""
        assert isinstance(weight, Plain)
        rows, at = into.view(numpy.uint16), 2 * first * self.width
        if self.lanes == self.width:
            weight.read(at, rows.data.cast("B"), sources)
            return
        narrow = numpy.empty((len(rows), self.width), numpy.uint16)
        weight.read(at, narrow.data.cast("B"), sources)
        rows[:, : self.width] = narrow

    def compute(self, halved: Halved, first: int, count: int) -> None:
        """Put sums of the rows that have been read, as they are rounded, into words; a tie goes away from zero.

        They are in the second half of `sums`.
        """
        words, weights, sums = self.stored[:count], self.weight[:, :count], self.sums[:, :count]
        bits = weights.view(numpy.uint32)
        numpy.left_shift(words, 16, out=bits[0])
        numpy.bitwise_and(words, SECOND, out=bits[1])
        for half, down in zip(sums, halved.down, strict=True):
            multiply(halved.added.up[first : first + count], down, half)
        numpy.add(sums, weights, out=sums)
        bits = sums.view(numpy.uint32)
        numpy.add(bits, HALF, out=bits)
        numpy.right_shift(bits[0], 16, out=bits[0])
        numpy.bitwise_and(bits[1], SECOND, out=bits[1])
        numpy.bitwise_or(bits[1], bits[0], out=bits[1])

    def unequal(self, first: int, count: int) -> tuple[NDArray[Any], ...]:
        """Elements in groups that have unequal ones: the numbers of those, (n,), and the bits of W, W + ΔW and W', (n,)."""
        every = (self.stored[:count], self.sums[1, :count], self.theirs[:count])
        weights, ours, theirs = (each.reshape(-1).view(numpy.uint64) for each in every)
        found = numpy.flatnonzero(numpy.not_equal(ours, theirs, out=self.differ[: len(ours)]))
        return found + first * self.lanes // GROUP, weights[found], ours[found], theirs[found]


def lanes_of(width: int) -> int:
    """So many elements of a row are computed: whole groups."""
    return -(-width // GROUP) * GROUP


def rows_of(width: int) -> int:
    """So many rows are computed at a time."""
    return max(1, TILE // max(1, width))


def are_sums(added: Added, places: tuple[Any, Any], weights: NDArray[Any], theirs: NDArray[Any]) -> bool:
    """Whether single elements are W + ΔW rounded once to bfloat16, for sure.

    Args:
        added: ΔW.
        places: their rows and columns, (count,) each.
        weights: (count,) of W.
        theirs: (count,) of the merged model.
    """
    rows, columns = places
    left, right = added.elements(rows, columns)
    values = numpy.einsum("ij,ij->i", left, right) * added.scale + weights
    terms = len(added.down) + 8
    margins = (abs(weights) + abs(values) + added.lengths[rows]) * (terms * ROUNDOFF[8] * GENEROUS)
    low, high = (rounded_once(each) for each in (values - margins, values + margins))
    sound = numpy.isfinite(values) & numpy.isfinite(theirs) & (abs(theirs) >= 2 * SMALLEST)
    open_ones = numpy.flatnonzero(sound & (low != high))
    for at in range(0, len(open_ones), TOGETHER):
        some = open_ones[at : at + TOGETHER]
        low[some] = exactly(weights[some], left[some], right[some], added.scale)
    return bool((sound & (low == theirs)).all())


def widened(stored: NDArray[Any]) -> NDArray[Any]:
    """The bits of bfloat16 as float32."""
    values: NDArray[Any] = numpy.left_shift(stored, 16, dtype=numpy.uint32).view(numpy.float32)
    return values
