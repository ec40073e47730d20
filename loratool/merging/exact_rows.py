"""W + Σ scale · up @ down, each element the number next to the exact value: the same bytes on every machine.

A sum in the working dtype comes with a bound of its error. Where both ends of the interval that the exact value lies in
round to the same number, that is the result; the few other elements are computed anew one by one (`single_elements`).
One product on a CPU is computed in float32 (`kernels`), and everything else in float64: what small weights and GPUs
lose by it is little, and sums of several places are rare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.algebra.rounding import FAR, alike_from, bits_of, round_once, tie_of
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, Tensor, numpy, torch
from loratool.merging.addends import Addend, Stack, by_place
from loratool.merging.bounds import GENEROUS, MOST_TERMS, ROUNDOFF
from loratool.merging.single_elements import SingleElements
from loratool.merging.totals import BlockSeen

if TYPE_CHECKING:
    Numbers = NDArray[numpy.float64]

MANY = 16  # where more than one of so many elements is undecided, it is asked whether anything is added to them
MOST_VIEWS = 64
SMALL = 1 << 15  # elements of a weight that are computed in float64, which takes fewer steps
WORKABLE = 2.0**-60, 2.0**60  # sizes of scales and sums that float32 computes with


@dataclass(frozen=True)
class Tile:
    """Memory for rows that are computed at a time."""

    weight: Tensor  # in the working dtype
    change: Tensor
    upper: list[Tensor]  # one end of the result, `with_integers`, and flags: a bool for an element, and these as int64
    single: list[Tensor]  # float32, with its bits as integers

    def ends(self, after: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Both ends of the result, `with_integers`, of which the lower ones are put into `after`."""
        lower, upper = with_integers(after), [*self.upper]
        if lower[2] is lower[1] or upper[2] is upper[1]:  # both or none in eights
            lower[2], upper[2] = lower[1], upper[1]
        return lower, upper


class Scratch:
    """Memory for some rows after the other."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.elements = elements
        every = (elements * itemsize, elements * itemsize, elements * 4)
        self.weight, self.change, self.upper = (torch.empty(n, dtype=torch.uint8, device=device) for n in every)
        self.flags = torch.empty(elements + 8, dtype=torch.uint8, device=device)
        self.tiles: dict[tuple[object, ...], Tile] = {}

    def of(self, rows: int, width: int, work: torch.dtype, target: torch.dtype) -> Tile:
        """So many rows."""
        key = rows, width, work, target
        if key not in self.tiles:
            if len(self.tiles) > MOST_VIEWS:
                self.tiles.clear()
            weight, change = (matrix_in(memory, rows, width, work) for memory in (self.weight, self.change))
            end, single = (matrix_in(self.upper, rows, width, dtype) for dtype in (target, torch.float32))
            flags = matrix_in(self.flags, -(-rows * width // 8), 8, torch.bool)
            upper = [*with_integers(end), flags.view(-1), flags.view(torch.int64).view(-1)]
            self.tiles[key] = Tile(weight, change, upper, [single, bits_of(single)])
        return self.tiles[key]


def matrix_in(memory: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Some memory as a matrix; new memory where it is too little."""
    size = rows * width * dtype.itemsize
    if size > memory.numel():
        return torch.empty(rows, width, dtype=dtype, device=memory.device)
    return memory[:size].view(dtype).view(rows, width)


def with_integers(values: Tensor) -> list[Tensor]:
    """A matrix; its bits as integers; and as integers of eight bytes, if its memory allows it."""
    bits, each = bits_of(values), 8 // values.element_size()
    fits = values.shape[-1] % each == 0 and values.storage_offset() % each == 0
    return [values, bits, bits.view(torch.int64) if fits else bits]


@dataclass
class Block:
    """Rows on their way, and those of their elements that may be rounded either way."""

    before: Tensor  # (n, width) as they are stored
    first: int  # their first row
    after: Tensor  # (n, width) of the target dtype
    measure: bool  # whether to measure ‖ΔW‖
    seen: BlockSeen = field(default_factory=BlockSeen)
    # undecided elements, on the CPU: their places in the flat rows, sums of W and ΔW in the working dtype, and W, and half
    # the lengths of the intervals of the sums
    doubts: list[tuple[Tensor, ...]] = field(default_factory=list)


class ExactSum:
    """All parts of one weight, ready on one device."""

    def __init__(self, parts: Iterable[Addend], width: int, target: torch.dtype, exact: torch.dtype, rows: int) -> None:
        """`rows` and `width` are those of the weight; `exact` is a dtype that holds every element of W as it is."""
        self.parts, self.rows, self.width, self.target, self.exact = tuple(parts), rows, width, target, exact
        self.work = working_dtype(self.parts, target, exact, rows * width)
        self.stacks = tuple(Stack.of(group, self.work) for group in by_place(self.parts))
        self.step = 2 * ROUNDOFF[self.work.itemsize]  # of a sum's size: what its rounding takes, and that of an end
        self.underflow = sum(stack.underflow for stack in self.stacks)
        self.kind = width, self.work, target  # of scratch memory

    def merge(
        self,
        before: Tensor,
        first: int,
        after: Tensor,
        scratch: Scratch,
        tile: int,
        substitute: Callable[[Tensor, int], None] | None = None,
        measure: bool = False,
    ) -> BlockSeen:
        """Put W + ΔW of some rows into `after`.

        Args:
            before: (n, width), rows from `first` on as they are stored.
            first: the first row.
            after: (n, width) of the target dtype.
            scratch: memory.
            tile: rows that are computed at a time.
            substitute: puts other values into rows of W before anything is added; it takes their first row.
            measure: whether to measure ‖ΔW‖.
        """
        block = Block(before, first, after, measure)
        product = self.only_product(first, len(before)) if substitute is None else None
        if product is None or not self.merge_product(block, product, scratch.of(tile, *self.kind)):
            if self.work == torch.float32:
                return self.wide.merge(before, first, after, scratch, max(1, tile // 2), substitute, measure)
            for at in range(0, len(before), tile):
                self.merge_tile(block, at, min(tile, len(before) - at), scratch, substitute)
        if block.doubts:
            self.decide(block)
            lap("settle")
        return block.seen

    def only_product(self, first: int, count: int) -> Stack | None:
        """The one product that is all that is added to so many rows from `first` on; None where it is not so simple."""
        stacks = [each for each in self.stacks if each.place.meets(first, first + count)]
        one = stacks[0] if len(stacks) == 1 and stacks[0].covers(first, count) else None
        return None if one is None or one.lifted is None or abs(one.scale) < WORKABLE[0] else one

    def merge_product(self, block: Block, product: Stack, room: Tile) -> bool:
        """Put W and the one product that is added into the rows of a block; False where another way has to be taken."""
        if self.work == torch.float32:
            return self.product_in_float32(block, product, room)
        few = block.after.is_cuda or self.rows * self.width <= SMALL  # of many, numpy on a CPU takes less time
        return few and self.target != torch.float64 and self.product_in_float64(block, product, room)

    def product_in_float32(self, block: Block, product: Stack, room: Tile) -> bool:
        """W and the one product, tile after tile; False where W is not finite, or numbers are too large for float32."""
        from loratool.merging.kernels import compiled, sum_within_margins

        own = product.rows_at(block.first, len(block.before))
        assert product.lifted is not None, "a product"
        (largest, weight, change), places = compiled(sum_within_margins)(
            block.before,
            (product.up[own], product.lifted, product.scale),
            (product.row_bounds[0][own], product.row_bounds[1][own]),
            self.underflow,
            *room.ends(block.after),
            (room.weight, room.change),
            block.measure,
        )
        lap("product")
        if not math.isfinite(largest):
            return False
        block.seen.largest, block.seen.weight, block.seen.change = largest, weight, change
        (places,) = self.in_changing_rows([places], block.before, block.first, block.after)
        self.settle(block, places, largest)
        lap("settle")
        return True

    def settle(self, block: Block, places: Tensor, largest: float) -> None:
        """Compute undecided elements in float64, and those that this leaves undecided exactly."""
        from loratool.merging.kernels import compiled, settle

        singles, after = self.singles, block.after
        parts = singles.factors_in(block.first, len(after))
        for some in torch.split(places, singles.together) if len(places) else ():
            left = compiled(settle)(some, block.before, block.first, after, parts, largest, singles.least)
            if len(left):
                weights = block.before.reshape(-1)[left]
                after.view(-1)[left] = singles.exactly(left + block.first * self.width, weights)

    def product_in_float64(self, block: Block, product: Stack, room: Tile) -> bool:
        """The same with few calls into torch, of which each takes as long as many elements; False where W is not finite."""
        from loratool.merging.kernels import compiled, decide_wide, sum_and_round_wide

        after, own = block.after, product.rows_at(block.first, len(block.before))
        assert product.down is not None, "a product"
        bound = product.reach, self.step * GENEROUS, (self.underflow + product.most_error) * GENEROUS
        near = (0, 0.0, 1.0) if after.element_size() == 4 else (tie_of(after.dtype), alike_from(after.dtype), FAR)
        told, places = compiled(sum_and_round_wide)(
            block.before,
            (product.up[own], product.down, product.scale),
            bound,
            near,
            [after, bits_of(after)],
            (room.weight, room.change),
            room.single,
            block.measure,
        )
        weight, change, largest, margin = told[:4].tolist()
        if not math.isfinite(largest):
            return False
        block.seen.largest, block.seen.weight, block.seen.change = largest, weight, change
        undecided = [places, *told[4:].chunk(2)]
        places, sums, weights = self.in_changing_rows(undecided, block.before, block.first, after)
        lap("product")
        if len(places):
            result, left = compiled(decide_wide)(sums, margin, torch.empty(0, dtype=after.dtype))
            if len(left):
                where = places[left.to(places.device)].cpu() + block.first * self.width
                result[left] = self.singles.exactly(where, weights[left])
            after.view(-1)[places] = result.to(after.device)
            lap("settle")
        return True

    def merge_tile(
        self, block: Block, at: int, count: int, scratch: Scratch, substitute: Callable[[Tensor, int], None] | None
    ) -> None:
        """Put W and everything that is added into some rows of a block, from the one at `at` on, in float64."""
        first, lower = block.first + at, block.after[at : at + count]
        room = scratch.of(count, *self.kind)
        weight, change = room.weight, room.change
        weight.copy_(block.before[at : at + count])
        lap("cast")
        block.seen.weight += float(torch.linalg.vector_norm(weight)) ** 2
        if substitute is not None:
            substitute(weight, first)
        size, odd = largest_of(weight), None
        if not math.isfinite(size):
            odd, kept = weight.isfinite().logical_not_(), convert(weight, self.target, finite=False)
            size = largest_of(weight.masked_fill_(odd, 0))
        lap("measure")
        stacks = [each for each in self.stacks if each.place.meets(first, first + count)]
        self.add(stacks, change, first)
        if block.measure:
            block.seen.change += float(torch.linalg.vector_norm(change)) ** 2
        lap("product")
        size += sum(stack.reach for stack in stacks)
        margin = self.underflow + self.step * size + sum(stack.most_error for stack in stacks)
        places = rounded(change.add_(weight), margin * GENEROUS, lower, room.upper)
        (places,) = self.in_changing_rows([places], weight, first, lower)
        if odd is not None:
            lower.copy_(torch.where(odd, kept, lower))
            places, size = places[~odd.view(-1)[places]], math.inf
        block.seen.largest = max(block.seen.largest, size)
        if len(places):
            sums, weights = change.view(-1)[places], weight.view(-1)[places]
            margins = torch.full_like(sums, margin * GENEROUS)
            block.doubts.append(tuple(each.cpu() for each in (places + at * self.width, sums, weights, margins)))
        lap("round")

    def add(self, stacks: Sequence[Stack], change: Tensor, first: int) -> None:
        """Make `change` what is added to rows from `first` on."""
        one = stacks[0] if len(stacks) == 1 and stacks[0].covers(first, len(change)) else None
        if one is not None and one.down is not None:
            change.addmm_(one.up[one.rows_at(first, len(change))], one.down, beta=0, alpha=one.scale)
            return
        change.zero_()
        for stack in stacks:
            stack.add_to(change, first)

    def in_changing_rows(
        self, undecided: Sequence[Tensor], weight: Tensor, first: int, after: Tensor
    ) -> Sequence[Tensor]:
        """Those of undecided elements that are in rows to which anything is added; the other rows of W go into `after`.

        Where they are few, all of them come back, for the question takes longer. Each element has an entry in each tensor;
        the first one has their places.
        """
        places = undecided[0]
        if len(places) <= after.numel() // MANY:
            return undecided
        changing = self.changing(first, len(after)).to(after.device)
        still = ~changing
        after[still] = round_once(weight[still], after.dtype)
        some = changing[places // self.width]
        return [each[some.to(each.device)] for each in undecided]

    def changing(self, first: int, count: int) -> Tensor:
        """To which of so many rows from `first` on anything is added: (count,) of bool."""
        changing = torch.zeros(count, dtype=torch.bool)
        for part in self.parts:
            start, stop = max(first, part.place.first), min(first + count, part.place.stop)
            if start < stop and part.scale:
                own = part.up[start - part.place.first : stop - part.place.first]
                changing[start - first : stop - first] |= (own != 0).any(1).cpu()
        return changing

    def decide(self, block: Block) -> None:
        """Put the results of undecided elements into a block."""
        places, sums, weights, margins = map(torch.cat, zip(*block.doubts, strict=True))
        result = self.singles.rounded(places + block.first * self.width, sums, weights, margins)
        block.after.view(-1)[places.to(block.after.device)] = result.to(block.after.device)

    @cached_property
    def singles(self) -> SingleElements:
        """The same for one element or the other."""
        return SingleElements(self.parts, self.stacks, self.width, self.target)

    @cached_property
    def wide(self) -> ExactSum:
        """The same, computed in float64."""
        return ExactSum(self.parts, self.width, self.target, torch.float64, self.rows)

    def sums(self, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """W + ΔW of some rows, from `first` on, in the working dtype, and how far each may be from the exact value."""
        change, errors = torch.zeros_like(weight), torch.zeros_like(weight)
        for stack in self.stacks:
            if not stack.place.meets(first, first + len(weight)):
                continue
            stack.add_to(change, first)
            start, stop = max(first, stack.place.first), min(first + len(weight), stack.place.stop)
            part = errors[start - first : stop - first, stack.place.columns]
            own = stack.lengths[start - stack.place.first : stop - stack.place.first]
            lengths, spans = (torch.from_numpy(each).to(weight) for each in (own, stack.spans))
            part += lengths[:, None] * spans * (abs(stack.scale) * stack.terms * GENEROUS)
        sizes = torch.where(errors != 0, weight.abs() + change.abs() + errors, 0)
        errors = (errors + 4 * sizes) * (ROUNDOFF[self.work.itemsize] * GENEROUS) + (errors != 0) * self.underflow
        return change.add_(weight), errors

    def change_of(self, rows: Tensor) -> Tensor:
        """ΔW of some rows, (n, width) in the working dtype; `rows` are their numbers."""
        change = torch.zeros(len(rows), self.width, dtype=self.work, device=rows.device)
        for stack in self.stacks:
            if stack.down is not None and stack.covers(int(rows[0]), int(rows[-1]) - int(rows[0]) + 1):
                change.addmm_(stack.up.index_select(0, rows - stack.place.first), stack.down, alpha=stack.scale)
                continue
            inside = torch.nonzero((rows >= stack.place.first) & (rows < stack.place.stop)).flatten()
            up = stack.up[rows[inside] - stack.place.first]
            part = up if stack.down is None else up @ stack.down
            change[inside[:, None], torch.arange(self.width, device=rows.device)[stack.place.columns]] += (
                part * stack.scale
            )
        return change


def rounded(sums: Tensor, margin: float, lower: Tensor, upper: list[Tensor]) -> Tensor:
    """Round sums in float64 into `lower`, and tell where another result is possible, give or take a margin.

    `upper` is memory, `with_integers`. What comes back are places in the flat order, on the device.
    """
    if lower.dtype == torch.float64:
        return torch.arange(sums.numel(), device=sums.device)
    if lower.dtype == torch.float32:
        upper[0].copy_(sums + margin)
        lower.copy_(sums - margin)
        return places_unlike(upper[1], bits_of(lower))
    single = sums.to(torch.float32)
    lower.copy_(single)
    tie = tie_of(lower.dtype)
    # whatever float32 is not at a tie is half a step of float32 away from one, and that is more than the margin
    near = (bits_of(single) & (2 * tie - 1)) == tie
    near |= single.abs_() < max(margin / FAR, alike_from(lower.dtype))
    return places_of(near)


def places_unlike(one: Tensor, other: Tensor) -> Tensor:
    """Where two matrices of integers differ, in their flat order."""
    if one.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero(one.numpy() != other.numpy()))  # several times faster than torch's
    return places_of(one != other)


def places_of(found: Tensor) -> Tensor:
    """Where a matrix is true, in its flat order."""
    if found.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero(found.numpy()))  # several times faster than torch's
    return torch.nonzero(found.view(-1)).flatten()


def convert(values: Tensor, dtype: torch.dtype, finite: bool) -> Tensor:
    """Numbers in another dtype, each the one next to it; a NaN is spelled in one way on every machine."""
    rounded = round_once(values, dtype)
    return rounded if finite else rounded.masked_fill(values.isnan(), math.nan)


def largest_of(values: Tensor) -> float:
    """The size of the largest; not finite where any is not, and 0 of none."""
    if not values.numel():
        return 0.0
    lowest, highest = torch.aminmax(values)
    return max(-float(lowest), float(highest))


def working_dtype(parts: Sequence[Addend], target: torch.dtype, exact: torch.dtype, elements: int) -> torch.dtype:
    """Float32 where it holds every W as it is and is faster, the target is narrower, and no scale or factor is far from 1."""
    on_gpu = any(part.up.is_cuda for part in parts)
    many = sum(part.rank for part in parts) >= MOST_TERMS
    if target.itemsize != 2 or exact == torch.float64 or on_gpu or many or elements <= SMALL:
        return torch.float64
    factors = [each for part in parts for each in (part.up, part.down) if each is not None and each.numel()]
    sizes = [*(abs(part.scale) for part in parts if part.scale), *(float(each.abs().max()) for each in factors)]
    small, large = WORKABLE
    return torch.float32 if all(size < large and (size > small or size == 0) for size in sizes) else torch.float64
