"""W + scale · up @ down rounded once to bfloat16 or float32, by numpy: importing torch takes longer than most of these sums.

The rule is that of `exact_rows`: a sum in float32, of float64 for results in float32, has a bound of its error, both ends
of the interval are rounded, and where they differ an element is decided in float64 and then in error-free sums. What is
rare is left to torch: weights that are not finite or out of range, and results near the smallest numbers. The bytes are
the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.reordered import Reordered, RowOrder
from loratool.bases.edits import Edit
from loratool.bases.packed import Packed
from loratool.bases.weights import WIDENED, Plain, StoredWeight, widen
from loratool.files.process import multiplies_alone
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, numpy
from loratool.merging.bounds import GENEROUS, MOST_TERMS, ROUNDOFF, TINIEST
from loratool.merging.numpy_rounding import RESULTS, Result, exactly, roundings
from loratool.merging.output_layout import Span
from loratool.merging.totals import BlockSeen

Read = Callable[["NDArray[Any]", int], None]
ROUNDINGS = ("nearest", "compensated")  # that numpy knows
TILE = 1 << 18  # elements that are computed at a time: of fewer, the calls take longer than the arithmetic
TOGETHER = 1 << 17  # numbers of undecided elements that are computed at a time: more would take fresh memory each time
SINGLE = 16  # such numbers besides the products of an element
MANY = 16  # where more than one of so many elements is undecided, torch finds out why
ALONE = 1 << 18  # multiplications of a product that OpenBLAS does on the calling thread: more threads are there already
ALONE_ANYWAY = 10**6  # where it has no others: more of them are not for its kernels of small products (AVX-512)
NEAR = 1 << 15  # bytes of a factor that a core has in its nearest cache
WORKABLE = 2.0**-60, 2.0**60  # sizes of factors and scales that float32 computes with
LARGEST = 2.0**120  # of weights and of what is added, so that no sum is near the largest number
SMALLEST = 2.0**-120  # of results: both dtypes have fewer digits from 2^-126 on


def suits(span: Span) -> bool:
    """Whether a span is a weight with no edit or one of the most common kind, in the output in bfloat16 or float32."""
    if span.packed or span.rounding not in ROUNDINGS or span.placed.dtype not in RESULTS or len(span.edits) > 1:
        return False
    return readable(span.weight) is not None and (not span.edits or is_one_product(span))


def is_one_product(span: Span) -> bool:
    """Whether the one edit of a span adds a product to all of a matrix."""
    (edit,) = span.edits
    update = update_of(edit)
    if update is None or edit.shared or edit.columns != slice(None) or len(span.shape) != 2:
        return False
    up: object = update.up  # tensors are annotated, and files are planned with
    down: object = update.down
    if not isinstance(up, StoredTensor) or not isinstance(down, StoredTensor):
        return False
    whole = (edit.first_row, edit.update_row, edit.rows) == (0, 0, span.rows)
    fits = (up.shape, down.shape) == ((span.rows, update.rank), (update.rank, span.width))
    return up.info.dtype in WIDENED and down.info.dtype in WIDENED and whole and fits


def readable(weight: StoredWeight) -> Plain | Packed | None:
    """A weight whose rows numpy reads; None for any other."""
    if isinstance(weight, Packed) and weight.shape[1:] != (weight.line,):
        return None
    return weight if isinstance(weight, Plain | Packed) and weight.by_numpy else None


def update_of(edit: Edit) -> LowRank | None:
    """The product that an edit adds, whose rows may be stored in another order; None for any other edit."""
    update = edit.update
    if isinstance(update, Reordered) and not update.start and update.shape[0] == update.inner.shape[0] == edit.rows:
        update = update.inner
    return update if isinstance(update, LowRank) else None


def order_of(edit: Edit) -> RowOrder | None:
    """The order in which the rows of an edit are stored."""
    return edit.update.order if isinstance(edit.update, Reordered) else None


@dataclass(frozen=True)
class Added:
    """scale · up @ down, with what bounds the error of computing it."""

    up: NDArray[Any]  # (rows, rank) of float32, or of float64
    down: NDArray[Any]  # (rank, width) of the same dtype
    scale: float

    @classmethod
    def by(cls, edit: Edit, work: type[Any]) -> Added:
        """What an edit adds, to be computed in some dtype."""
        update, order = update_of(edit), order_of(edit)
        assert update is not None
        factors: Any = update.up, update.down
        up, down = (values_of(each).astype(work, copy=False) for each in factors)
        rows = up if order is None else up[order.numbers(len(up))]
        return cls(rows, down, update.scale * edit.strength)

    @cached_property
    def is_workable(self) -> bool:
        """Whether float32 computes with its numbers."""
        sizes = abs(self.scale), *self.sizes
        within = all(size == 0 or WORKABLE[0] < size < WORKABLE[1] for size in sizes) and len(self.down) < MOST_TERMS
        return self.scale != 0 and within and self.length < LARGEST

    @cached_property
    def sizes(self) -> tuple[float, float]:
        """Those of the largest elements of `up` and `down`."""
        up, down = (float(numpy.abs(each).max(initial=0)) for each in (self.up, self.down))
        return up, down

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖, by products of r × r."""
        up, down = self.up.astype(numpy.float64), self.down.astype(numpy.float64)
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))

    @cached_property
    def length(self) -> float:
        """The largest of `lengths`."""
        return float(self.lengths.max(initial=0))

    @cached_property
    def cut(self) -> NDArray[Any]:
        """(parts, rank + 1, columns): scale · down with a row of ones, by which a constant is added, in parts of columns."""
        rank, width = self.down.shape
        scaled = numpy.ones((rank + 1, width), self.down.dtype)
        numpy.multiply(self.down, self.scale, out=scaled[:rank], casting="same_kind")
        return parts_of(scaled, NEAR // max(1, scaled[:, :1].nbytes))

    @cached_property
    def turned(self) -> NDArray[Any]:
        """(width, rank): the columns of `down` as rows."""
        return numpy.ascontiguousarray(self.down.T)

    @cached_property
    def lengths(self) -> NDArray[Any]:
        """(rows,) of float64: no element of a row of ΔW is larger, nor any sum of the sizes of what it is the sum of."""
        rows, columns = (  # einsum widens some values at a time
            numpy.sqrt(numpy.einsum(axes, f, f, dtype=numpy.float64))
            for axes, f in (("ij,ij->i", self.up), ("ij,ij->j", self.down))
        )
        found: NDArray[Any] = rows * (float(columns.max(initial=0)) * abs(self.scale) * GENEROUS)
        return found

    @cached_property
    def margins(self) -> NDArray[Any]:
        """(rows,) of float64: how far a computed element of ΔW, with a constant added, may be from the exact value."""
        terms = roundings(len(self.down), self.scale)
        up, down = self.sizes
        size = self.up.itemsize
        # some machines take the smallest factors for 0
        underflow = terms * TINIEST[size] * (1 + up) * (1 + abs(self.scale)) * (1 + down)
        found: NDArray[Any] = self.lengths * (terms * ROUNDOFF[size]) + underflow
        return found

    def of_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(n, width): some rows of ΔW by their numbers."""
        parts = numpy.matmul(self.up[rows], self.cut[:, :-1])
        change: NDArray[Any] = parts.transpose(1, 0, 2).reshape(len(rows), -1)
        return change

    def elements(
        self, rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any], result: Result
    ) -> NDArray[Any] | None:
        """The bits of single elements of W + ΔW, rounded once; None where one of them takes torch.

        Args:
            rows: their numbers, (count,).
            columns: likewise.
            weights: (count,) of W.
            result: what they are rounded to.
        """
        step = TOGETHER // (len(self.down) + SINGLE)
        cuts = [slice(at, at + step) for at in range(0, len(rows), step)]
        found = [self.elements_at_once(rows[cut], columns[cut], weights[cut], result) for cut in cuts]
        known = [each for each in found if each is not None]
        return None if len(known) < len(found) else numpy.concatenate([numpy.empty(0, result.bits), *known])

    def elements_at_once(
        self, rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any], result: Result
    ) -> NDArray[Any] | None:
        """The same of a few."""
        left, right, last = self.up.take(rows, 0), self.turned.take(columns, 0), result.last
        values = numpy.einsum("ij,ij->i", left, right, dtype=numpy.float64) * self.scale + weights
        size = float(abs(weights).max()) + self.length
        margin = size * (2 * (len(self.down) + 8) * ROUNDOFF[8] * GENEROUS)
        low, high = ((values + each).view(numpy.uint64) + last // 2 for each in (-margin, margin))
        left_open = numpy.flatnonzero((low ^ high >= last) | (abs(values) < 2 * SMALLEST))
        found = (low & numpy.uint64((1 << 64) - last)).view(numpy.float64)
        if len(left_open):
            exact = exactly(weights[left_open], left[left_open], right[left_open], self.scale, last)
            if not ((abs(exact) >= SMALLEST) | (exact == 0)).all():
                return None
            found[left_open] = exact
        return result.of_rounded(found)


class Tiles:
    """Memory for rows of one width, which are computed some at a time."""

    def __init__(self, width: int, result: Result = RESULTS["BF16"]) -> None:
        self.width, self.rows, self.result = width, max(1, TILE // max(1, width)), result
        shape = self.rows, width
        self.weight = numpy.empty(shape, numpy.float32)
        self.sums, self.low = (numpy.empty(shape, result.work) for _ in range(2))
        self.differ = numpy.empty(self.rows * width, numpy.bool_)

    def merge(
        self,
        added: Added,
        read: Read,
        first: int,
        after: NDArray[Any],
        every: int,
        look: bool,
        meant: Added | None = None,
        module: str = "",
    ) -> BlockSeen | None:
        """Put W + ΔW of some rows into `after`; None where torch has to do it.

        Args:
            added: ΔW.
            read: puts rows of W, from some row on, into (n, width) of float32.
            first: the first row.
            after: (n, width) for the bits of the result.
            every: of so many rows one is looked at for what rounding leaves of the update.
            look: whether it is asked if any element changes.
            meant: the update, where `added` is corrected so that rounding leaves more of it.
            module: that it is of.
        """
        seen = BlockSeen()
        odd: list[tuple[NDArray[Any], NDArray[Any]]] = []  # places of undecided elements, and W there
        sampled: list[tuple[int, NDArray[Any]]] = []
        with numpy.errstate(all="ignore"):  # of what is not finite
            for at in range(0, len(after), self.rows):
                count = min(self.rows, len(after) - at)
                weight = self.weight[:count]
                read(weight, first + at)
                lap("decode")
                largest = max(float(weight.max()), -float(weight.min()))
                if not largest < LARGEST:
                    return None
                seen.weight += float(numpy.vdot(weight, weight))
                lap("measure")
                places = self.sum(added, weight, first + at, largest, after[at : at + count])
                if len(places) * MANY > weight.size:
                    places = self.keep_unchanged(added, weight, first + at, after[at : at + count], places)
                if len(places) * MANY > weight.size:
                    return None
                odd.append((places + at * self.width, weight.reshape(-1)[places]))
                lap("product")
                start = at + -(first + at) % every
                sampled += [(row, weight[row - at].copy()) for row in range(start, at + count, every)]
                if look and not seen.changed:
                    differ = self.result.nearest(weight.reshape(-1)) != after[at : at + count].reshape(-1)
                    differ[places] = False  # of which nobody knows yet
                    seen.changed = bool(differ.any())
                    lap("look")
            places, weights = (numpy.concatenate(some) for some in zip(*odd, strict=True))
            rows = places // self.width
            settled = added.elements(rows + first, places - rows * self.width, weights, self.result)
            if settled is None:
                return None
            after.reshape(-1)[places] = settled
            seen.changed = seen.changed or (look and bool((self.result.nearest(weights) != settled).any()))
            lap("settle")
            if sampled:
                product, squared = self.kept_of(meant or added, first, sampled, after)
                seen.kept = {module: (every * product, every * squared)}
            lap("gain")
        return seen

    def convert(self, read: Read, first: int, after: NDArray[Any]) -> bool:
        """Put rows of W, rounded to the nearest, into `after`, (n, width) of bits; False where torch has to do it."""
        for at in range(0, len(after), self.rows):
            rows = after[at : at + self.rows]
            weight = self.weight[: len(rows)]
            read(weight, first + at)
            lap("decode")
            if not max(float(weight.max()), -float(weight.min())) < LARGEST:
                return False
            numpy.copyto(rows, self.result.nearest(weight, self.low[: len(rows)]), casting="unsafe")
            lap("round")
        return True

    def sum(self, added: Added, weight: NDArray[Any], first: int, largest: float, after: NDArray[Any]) -> NDArray[Any]:
        """Put W + ΔW of some rows into `after`; the flat places at which another result is possible.

        With ε for the error of a computed ΔW and ρ for that of one more rounding, W + (ΔW + ε + ρ) is computed with an
        error of at most ε + ρ, so that it is no less than the exact value x and no more than x + 2 (ε + ρ). What is
        2 (ε + ρ) + ρ less is therefore no more than x once it is rounded.
        """
        count, lifted = len(weight), added.cut.shape[1]
        sums, low, differ = self.sums[:count], self.low[:count], self.differ[: weight.size]
        own = slice(first, first + count)
        rounding = (largest + added.lengths[own]) * (ROUNDOFF[sums.itemsize] * GENEROUS)
        margins = added.margins[own] * GENEROUS + rounding
        column, lengths = (each.astype(sums.dtype)[:, None] for each in (margins, 2 * margins + rounding))
        up = numpy.empty((count, lifted), sums.dtype)
        up[:, :-1], up[:, -1:] = added.up[own], column
        multiply(up, added.cut, sums, alone())
        numpy.add(sums, weight, out=sums)
        self.result.put_ends(sums, lengths, low, after, differ)
        return places_of(differ)

    def keep_unchanged(
        self, added: Added, weight: NDArray[Any], first: int, after: NDArray[Any], places: NDArray[Any]
    ) -> NDArray[Any]:
        """Put rows of W, from row `first` on, to which nothing is added into `after`; the flat places that are not in them."""
        still = added.lengths[first : first + len(weight)] == 0
        after[still] = self.result.nearest(weight[still])
        others: NDArray[Any] = places[~still[places // weight.shape[1]]]
        return others

    def kept_of(
        self, added: Added, first: int, sampled: list[tuple[int, NDArray[Any]]], after: NDArray[Any]
    ) -> tuple[float, float]:
        """⟨W' − W, ΔW⟩ and ‖ΔW‖² of sampled rows, each with its number from `first` on and its W."""
        rows = numpy.array([row for row, _ in sampled])
        change = added.of_rows(rows + first)
        applied = numpy.empty_like(change)
        widen(applied.reshape(-1), after[rows].reshape(-1).view(numpy.uint8), self.result.dtype)
        applied -= numpy.stack([weight for _, weight in sampled])
        applied *= change
        return float(applied.sum(1).sum(dtype=numpy.float64)), float(numpy.vdot(change, change))


def alone() -> int:
    """So many multiplications of a product stay on the calling thread."""
    return ALONE_ANYWAY if multiplies_alone() else ALONE


def in_parts(down: NDArray[Any], rows: int, most: int = ALONE) -> NDArray[Any]:
    """(rank, width) in parts of columns, (parts, rank, columns), for `multiply` with so many rows."""
    return parts_of(down, most // max(1, len(down) * rows))


def parts_of(down: NDArray[Any], columns: int) -> NDArray[Any]:
    """(rank, width) in parts of up to so many columns, 32 at least, (parts, rank, columns)."""
    rank, width = down.shape
    columns = math.gcd(width, 1 << max(32, columns).bit_length() - 1)
    step = columns if columns >= 16 else max(1, width)  # an odd one stays whole
    return numpy.ascontiguousarray(down.reshape(rank, width // step, step).transpose(1, 0, 2))


def multiply(left: NDArray[Any], cut: NDArray[Any], out: NDArray[Any], most: int = ALONE) -> None:
    """Put `left`, (n, rank), times all parts, (parts, rank, columns), into `out`, (n, parts · columns), on this thread.

    `most` multiplications are done at a time. More of them may be added up in another order.
    """
    step = max(4, most // max(1, cut[0].size))  # fewer rows where a narrow or odd width leaves parts too large
    for at in range(0, len(left), step):
        some = out[at : at + step]
        numpy.matmul(left[at : at + step], cut, out=some.reshape(len(some), len(cut), -1).transpose(1, 0, 2))


def places_of(found: NDArray[Any]) -> NDArray[Any]:
    """`flatnonzero` of flags, few of which are set: those are looked for among eight at a time."""
    if len(found) % 8:
        return numpy.flatnonzero(found)
    eights = numpy.flatnonzero(found.view(numpy.uint64) != 0)
    places = numpy.flatnonzero(found.reshape(-1, 8).take(eights, 0))
    return eights.take(places >> 3) * 8 + (places & 7)


def values_of(tensor: StoredTensor) -> NDArray[Any]:
    """A factor in float32."""
    raw = numpy.empty(tensor.info.nbytes, numpy.uint8)
    tensor.read(0, raw.data)
    if tensor.info.dtype == "F32":
        values = raw.view(numpy.float32).reshape(tensor.info.shape)
    else:
        values = numpy.empty(tensor.info.shape, numpy.float32)
        widen(values.reshape(-1), raw, tensor.info.dtype)
    return numpy.ascontiguousarray(values.T) if tensor.transposed else values
