"""Weights of bfloat16 to which one product is added, compared by numpy: importing torch takes longer than most of them.

The rule is that of `quick`: a sum in float32 that is rounded is the formula's once rounded but next to a tie, and elements
that differ are decided in float64. What is not settled so is left to torch; of a model that is as it should be, that is
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratool.bases.weights import Plain
from loratool.lazy import NDArray, numpy
from loratool.merging import numpy_sums
from loratool.merging.addends import GENEROUS, ROUNDOFF
from loratool.merging.numpy_rounding import HALF, exactly, rounded_once
from loratool.merging.numpy_sums import Added, multiply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratool.files.open_sources import OpenSources
    from loratool.verifying.pairing import Pair

MOST = 1 << 31  # elements in all: of more of them, the import of torch is a small part of the time
MANY = 64  # where more than one of so many elements differs, torch finds out what they are
TILE = 1 << 18  # elements that are computed at a time: of fewer, the calls take longer than the arithmetic
SMALLEST = 2.0**-126  # below it a bfloat16 has fewer digits
TOGETHER = 1 << 12  # elements that are summed exactly at a time


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
        multiply(added.up[first : first + count], added.cut[:, :-1], sums)
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
    left, right = added.elements(rows, columns)
    values = numpy.einsum("ij,ij->i", left, right) * added.scale + weights
    terms = len(added.down) + 8
    margins = (abs(weights) + abs(values) + added.lengths[rows]) * (terms * ROUNDOFF[8] * GENEROUS)
    low, high = (rounded_once(each) for each in (values - margins, values + margins))
    open_ones = numpy.flatnonzero(low != high)
    for at in range(0, len(open_ones), TOGETHER):
        some = open_ones[at : at + TOGETHER]
        low[some] = exactly(weights[some], left[some], right[some], added.scale)
    sound = numpy.isfinite(theirs) & (abs(theirs) >= 2 * SMALLEST)
    return bool((sound & (low == theirs)).all())


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
