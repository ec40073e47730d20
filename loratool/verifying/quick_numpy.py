"""Weights of bfloat16 to which one product is added, compared by numpy: importing torch takes longer than most of them.

The rule is that of `quick`: a sum in float32 that is rounded is the formula's once rounded but next to a tie, and elements
that differ are decided in float64. What is not settled so is left to torch; of a model that is as it should be, that is
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratool.bases.edits import Edit
from loratool.bases.weights import Plain, StoredWeight
from loratool.files.open_sources import OpenSources
from loratool.lazy import NDArray, numpy
from loratool.merging import numpy_sums
from loratool.merging.numpy_rounding import HALF, RESULTS
from loratool.merging.numpy_sums import NEAR, Added, alone, parts_of
from loratool.verifying.pairing import Pair

MOST = 1 << 31  # elements in all: of more of them, the import of torch is a small part of the time
MANY = 64  # where more than one of so many elements differs, torch finds out what they are
TILE = 1 << 19  # elements that are computed at a time: of fewer, the calls take longer than the arithmetic
COLUMNS = 256  # of a part of the product: of more of them, one with few rows is too large for its quickest kernel
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
    down: NDArray[Any]  # of all first elements, and of all second ones: (2, parts, rank, columns) of float32

    @classmethod
    def by(cls, edit: Edit) -> Halved:
        """What an edit adds."""
        added = Added.by(edit, numpy.float32)
        rank, width = added.down.shape
        scaled = numpy.zeros((rank, lanes_of(width)), numpy.float32)
        numpy.multiply(added.down, added.scale, out=scaled[:, :width], casting="same_kind")
        columns = min(COLUMNS, NEAR // max(1, 4 * rank))
        return cls(added, numpy.stack([parts_of(scaled[:, each::2], columns) for each in (0, 1)]))


class Words:
    """Memory of tiles of any width, for one thread: fresh memory for each would take as long as reading into it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.stored, self.theirs = (numpy.empty(count, numpy.uint32) for _ in range(2))
        self.weight = numpy.empty(count, numpy.float32)  # of one half after the other: less memory is in caches longer
        self.sums = numpy.empty(2 * count, numpy.float32)  # of both halves
        self.differ = numpy.empty(count // 2, numpy.bool_)  # by groups of elements


class Tile:
    """Memory for some rows of a width: W and W' are read into it, and W + ΔW is computed there.

    Two elements that are neighbours are one word of 32 bits: a shift makes a float32 of the first one, and a mask of
    the second. One half of the memory holds all first elements, the other one all second ones, and that is the order in
    which the product gives them. Numpy is slow with 16 bits in every other place, and fast with words.
    """

    def __init__(self, width: int, rows: int = 0, memory: Words | None = None) -> None:
        """As many rows as are computed at a time, or fewer. Views are made once: other threads wait for each."""
        self.rows, self.width, self.lanes = rows or rows_of(width), width, lanes_of(width)
        shape = self.rows, self.lanes // 2
        count = self.rows * self.lanes // 2
        self.memory = memory if memory is not None and memory.count >= count else Words(max(count, TILE // 2))
        flat = self.memory
        self.stored, self.theirs, self.weight = (
            each[:count].reshape(shape) for each in (flat.stored, flat.theirs, flat.weight)
        )
        self.sums, self.differ = flat.sums[: 2 * count].reshape(2, *shape), flat.differ[: count // 2]
        self.bits = self.sums.view(numpy.uint32)
        self.groups = [each.reshape(-1).view(numpy.uint64) for each in (self.stored, self.bits[1], self.theirs)]
        self.parts: dict[int, Tile] = {}

    def of(self, rows: int) -> Tile:
        """The memory of the first rows."""
        if rows == self.rows:
            return self
        if rows not in self.parts:
            self.parts[rows] = Tile(self.width, rows, self.memory)
        return self.parts[rows]

    def settled(self, pair: Pair, halved: Halved, first: int, count: int, sources: OpenSources) -> bool:
        """Whether all elements of some rows are found to be the formula's."""
        odd: list[tuple[NDArray[Any], ...]] = []
        with numpy.errstate(all="ignore"):  # of what is not finite
            for at in range(first, first + count, self.rows):
                tile = self.of(min(self.rows, first + count - at))
                tile.read(pair.span.weight, at, tile.stored, sources)
                tile.read(pair.theirs, at, tile.theirs, sources)
                tile.compute(halved, at)
                found = tile.unequal()
                if len(found) * MANY > tile.rows * tile.width:
                    return False
                if len(found):
                    odd.append((found + at * self.lanes // GROUP, *(each[found] for each in tile.groups)))
            return not odd or self.are_sums(halved.added, *(numpy.concatenate(each) for each in zip(*odd, strict=True)))

    def read(self, weight: StoredWeight, first: int, into: NDArray[Any], sources: OpenSources) -> None:
        """Put rows of a weight from `first` on into words."""
        assert isinstance(weight, Plain)
        at = 2 * first * self.width
        if self.lanes == self.width:
            weight.read(at, into.data.cast("B"), sources)
            return
        narrow = numpy.empty((self.rows, self.width), numpy.uint16)
        weight.read(at, narrow.data.cast("B"), sources)
        elements = into.view(numpy.uint16)
        elements[:, : self.width], elements[:, self.width :] = narrow, 0

    def compute(self, halved: Halved, first: int) -> None:
        """Put sums of the rows that have been read, as they are rounded, into words; a tie goes away from zero.

        They are in the second half of `bits`.
        """
        *_, rank, columns = halved.down.shape
        out = self.sums.reshape(2, self.rows, -1, columns).transpose(0, 2, 1, 3)
        times = -(-self.rows * rank * columns // alone())
        step = max(4, -(-self.rows // max(1, times)))  # as many rows each time
        for at in range(0, self.rows, step):
            rows = halved.added.up[first + at : first + min(at + step, self.rows)]
            numpy.matmul(rows, halved.down, out=out[:, :, at : at + step])
        weights, (low, high) = self.weight.view(numpy.uint32), self.bits
        numpy.left_shift(self.stored, 16, out=weights)
        numpy.right_shift(self.lifted(0), 16, out=low)
        numpy.bitwise_and(self.stored, SECOND, out=weights)
        numpy.bitwise_and(self.lifted(1), SECOND, out=high)
        numpy.bitwise_or(high, low, out=high)

    def lifted(self, half: int) -> NDArray[Any]:
        """The bits of W + ΔW of one half, which are rounded once the last 16 are cut off."""
        bits: NDArray[Any] = self.bits[half]
        numpy.add(self.sums[half], self.weight, out=self.sums[half])
        numpy.add(bits, HALF, out=bits)
        return bits

    def unequal(self) -> NDArray[Any]:
        """The numbers of groups of elements in which W + ΔW is not W'."""
        _, ours, theirs = self.groups
        return numpy.flatnonzero(numpy.not_equal(ours, theirs, out=self.differ))

    def are_sums(
        self, added: Added, found: NDArray[Any], stored: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]
    ) -> bool:
        """Whether the unequal elements of some groups are W + ΔW rounded once, for sure.

        `found` are the numbers of the groups; the others are the bits of W, W + ΔW and W', (n,) of uint64 each.
        """
        weights, computed, given = (each.view(numpy.uint16) for each in (stored, ours, theirs))
        some = numpy.flatnonzero(computed != given)
        rows, columns = divmod(found[some // GROUP] * GROUP + some % GROUP, self.lanes)
        values = numpy.left_shift(weights[some], 16, dtype=numpy.uint32).view(numpy.float32)
        if not numpy.isfinite(values).all():
            return False
        sums = added.elements(rows, columns, values, RESULTS["BF16"])
        return sums is not None and numpy.array_equal(sums, given[some])


def lanes_of(width: int) -> int:
    """So many elements of a row are computed: whole groups."""
    return -(-width // GROUP) * GROUP


def rows_of(width: int) -> int:
    """So many rows are computed at a time."""
    return max(1, TILE // max(1, width))
