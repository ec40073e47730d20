"""W + Σ scale · up @ down, each element the number next to the exact value: the same bytes on every machine.

A product in the working dtype comes with a bound of its error. Where both ends of the interval that the exact value
lies in round to the same number, that is the result; the few other elements are computed anew one by one
(`single_elements`). The working dtype is float32 on a CPU, and float64 where that costs nothing: on a GPU, in small
weights, and where the output is wider than 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratool.algebra.rounding import FAR, alike_from, bits_of, round_once, tie_of
from loratool.files.stopwatch import lap
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.parts import GENEROUS, ROUNDOFF, Part, Stack, by_place
from loratool.merging.single_elements import SingleElements

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[Any]  # of float32 or float64
    Numbers = NDArray[numpy.float64]
    Places = NDArray[numpy.int64]

MANY = 16  # where more than one of so many elements is undecided, it is asked whether anything is added to them
MOST_VIEWS = 64
CACHED = 1 << 18  # elements of 16 bits that stay in a core's cache
SMALL = 1 << 15  # elements of a weight that are computed in float64, which takes fewer steps
WORKABLE = 2.0**-60, 2.0**60  # sizes of scales and sums that float32 computes with


@dataclass
class Seen:
    """What was seen of a block of rows."""

    weight: float = 0.0  # ‖W‖²
    change: float = 0.0  # ‖ΔW‖²
    largest: float = 0.0  # no element of the result is larger in size
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # of sampled rows: module → as `Totals.kept`


class Tile:
    """Memory for rows that are computed at a time, as matrices, and on a CPU as flat arrays too."""

    def __init__(self, weight: Tensor, change: Tensor, upper: Tensor) -> None:
        """Of the weight and of the change, in the working dtype, and of one end of the result."""
        self.weight, self.change, self.upper = weight, change, upper
        self.arrays: tuple[Values, ...] = ()
        if weight.device.type == "cpu":
            self.arrays = tuple(each.view(-1).numpy() for each in (weight, change, bits_of(upper)))

    def at(self, places: Places) -> tuple[Values, Values]:
        """Single elements of the weight and of the change."""
        if self.arrays:
            return self.arrays[0].take(places), self.arrays[1].take(places)
        there = torch.from_numpy(places).to(self.weight.device)
        one, other = (each.view(-1)[there].cpu().numpy() for each in (self.weight, self.change))
        return one, other


class Scratch:
    """Memory for some rows after the other."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.elements = elements
        every = (elements * itemsize, elements * itemsize, elements * 4)
        self.weight, self.change, self.upper = (torch.empty(n, dtype=torch.uint8, device=device) for n in every)
        self.unequal = numpy.empty(elements if device.type == "cpu" else 0, numpy.bool_)
        self.tiles: dict[tuple[object, ...], Tile] = {}

    def of(self, rows: int, width: int, work: torch.dtype, target: torch.dtype) -> Tile:
        """So many rows."""
        key = rows, width, work, target
        if key not in self.tiles:
            if len(self.tiles) > MOST_VIEWS:
                self.tiles.clear()
            every = ((self.weight, work), (self.change, work), (self.upper, target))
            self.tiles[key] = Tile(*(matrix_in(memory, rows, width, dtype) for memory, dtype in every))
        return self.tiles[key]


def matrix_in(memory: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Some memory as a matrix; new memory where it is too little."""
    size = rows * width * dtype.itemsize
    if size > memory.numel():
        return torch.empty(rows, width, dtype=dtype, device=memory.device)
    return memory[:size].view(dtype).view(rows, width)


@dataclass
class Undecided:
    """Elements of some rows that may be rounded either way."""

    places: list[Places] = field(default_factory=list)  # in the flat rows
    sums: list[Values] = field(default_factory=list)  # of W and ΔW, in the working dtype
    weights: list[Values] = field(default_factory=list)  # of W
    margins: list[Numbers] = field(default_factory=list)  # of the rows that they are in

    def add(self, places: Places, start: int, room: Tile, margins: Numbers) -> None:
        """Keep elements of a tile; it begins at place `start` of the rows."""
        weights, sums = room.at(places)
        for each, some in ((self.places, places + start), (self.sums, sums), (self.weights, weights)):
            each.append(some)
        self.margins.append(margins)


class ExactSum:
    """All parts of one weight, ready on one device."""

    def __init__(self, parts: Iterable[Part], width: int, target: torch.dtype, exact: torch.dtype, rows: int) -> None:
        """`rows` and `width` are those of the weight; `exact` is a dtype that holds every element of W as it is."""
        self.parts, self.rows, self.width, self.target, self.exact = tuple(parts), rows, width, target, exact
        self.work = working_dtype(self.parts, target, exact, rows * width)
        self.stacks = tuple(Stack.of(group, self.work) for group in by_place(self.parts))
        self.step = 2 * ROUNDOFF[self.work.itemsize]  # of a sum's size: what its rounding takes, and that of an end
        self.underflow = sum(stack.underflow for stack in self.stacks)

    def merge(
        self,
        before: Tensor,
        first: int,
        after: Tensor,
        scratch: Scratch,
        tile: int,
        substitute: Callable[[Tensor, int], None] | None = None,
        measure: bool = False,
    ) -> Seen:
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
        seen, undecided = Seen(), Undecided()
        largest = math.inf if substitute else largest_of(before)
        ready = self.ready(first, before.shape[0], largest, lifted=not measure)
        for at in range(0, before.shape[0], tile):
            stored, lower = before[at : at + tile], after[at : at + tile]
            room, offset = scratch.of(stored.shape[0], self.width, self.work, self.target), at
            room.weight.copy_(stored)
            lap("cast")
            seen.weight += float(torch.linalg.vector_norm(room.weight)) ** 2
            odd = None
            if not math.isfinite(largest):
                if substitute is not None:
                    substitute(room.weight, first + at)
                size = largest_of(room.weight)
                if not math.isfinite(size):
                    odd, kept = room.weight.isfinite().logical_not_(), convert(room.weight, self.target, finite=False)
                    size = largest_of(room.weight.masked_fill_(odd, 0))
                ready, offset = self.ready(first + at, stored.shape[0], size, lifted=not measure), 0
            lap("measure")
            ready.add(room.change, offset)
            if measure:
                seen.change += float(torch.linalg.vector_norm(room.change)) ** 2
            lap("product")
            unsure = self.round(ready, offset, room, lower, scratch)
            if odd is not None:
                lower.copy_(torch.where(odd, kept, lower))
                unsure = unsure[~odd.cpu().numpy().reshape(-1)[unsure]]
            seen.largest = max(seen.largest, ready.largest if odd is None else math.inf)
            if len(unsure):
                undecided.add(unsure, at * self.width, room, ready.margins[offset + unsure // self.width])
            lap("round")
        if undecided.places:
            self.decide(after, first, undecided)
            lap("settle")
        return seen

    def ready(self, first: int, count: int, largest: float, lifted: bool) -> Ready:
        """What is the same for so many rows from `first` on; no element of W is larger in size there.

        Args:
            first: the first row.
            count: of rows.
            largest: the size.
            lifted: whether the change is to be the upper end of its interval, where it is computed in float32.
        """
        stacks = [each for each in self.stacks if each.place.meets(first, first + count)]
        largest += sum(stack.reach for stack in stacks)
        margins = numpy.full(count, self.underflow + self.step * largest)
        for stack in stacks:
            start, stop = max(first, stack.place.first), min(first + count, stack.place.stop)
            margins[start - first : stop - first] += stack.errors(start, stop)
        margins *= GENEROUS
        return Ready(stacks, first, largest, margins, lifted and self.work == torch.float32)

    def round(self, ready: Ready, offset: int, room: Tile, lower: Tensor, scratch: Scratch) -> Places:
        """Round W and the change of a tile into `lower`, and tell in which places another result is possible.

        In float32 the change becomes the lower end of the interval in which the sum is.
        """
        sums = room.change.add_(room.weight)
        if self.target == torch.float64:
            unsure: Places = numpy.arange(sums.numel())
        elif self.work == torch.float64 and self.target.itemsize == 2:
            unsure = rounded_by_way_of_float32(sums, float(ready.margins.max()), lower)
        else:
            margins = ready.column(sums)[offset : offset + len(sums)]
            room.upper.copy_(sums if ready.lifted else sums + margins)
            if self.work == torch.float32:
                lower.copy_(sums.sub_(margins, alpha=2 if ready.lifted else 1))
            else:
                lower.copy_(sums - margins)
            unsure = differing(room, lower, scratch.unequal)
        if len(unsure) > lower.numel() // MANY:
            changing = self.changing(ready.stacks, ready.first + offset, room.weight, lower)
            unsure = unsure[changing[unsure // self.width]]
        return unsure

    def changing(self, stacks: Sequence[Stack], first: int, weight: Tensor, lower: Tensor) -> NDArray[numpy.bool_]:
        """The rows to which anything is added, as (n,); the others are put into `lower`."""
        changing = numpy.zeros(weight.shape[0], numpy.bool_)
        for stack in stacks:
            start, stop = max(first, stack.place.first), min(first + len(changing), stack.place.stop)
            if start < stop:
                changing[start - first : stop - first] |= stack.lengths_of(start, stop) != 0
        still = torch.from_numpy(~changing).to(weight.device)
        lower[still] = round_once(weight[still], self.target)
        return changing

    def decide(self, after: Tensor, first: int, undecided: Undecided) -> None:
        """Put the results of undecided elements into `after`, which holds rows from `first` on."""
        places, margins = numpy.concatenate(undecided.places), numpy.concatenate(undecided.margins)
        sums = numpy.concatenate(undecided.sums)
        weights = numpy.concatenate(undecided.weights)
        result = self.singles.rounded(places + first * self.width, sums, weights, margins)
        if after.device.type == "cpu":
            bits_of(after).view(-1).numpy()[places] = bits_of(result).numpy()
        else:
            after.view(-1)[torch.from_numpy(places).to(after.device)] = result.to(after.device)

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
            lengths, spans = (
                torch.from_numpy(each).to(weight) for each in (stack.lengths_of(start, stop), stack.spans)
            )
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


class Ready:
    """What is the same for all tiles of some rows."""

    def __init__(self, stacks: Sequence[Stack], first: int, largest: float, margins: Numbers, lifted: bool) -> None:
        """`margins`: how far the sums of each row may be from the exact values, roundings of the ends included."""
        self.stacks, self.first, self.largest, self.margins, self.lifted = stacks, first, largest, margins, lifted
        one = stacks[0] if len(stacks) == 1 and stacks[0].covers(first, len(margins)) else None
        self.factors: tuple[Tensor, Tensor] | None = None  # of the one product that is all of the change
        self.columns: Tensor | None = None
        if one is not None and one.down is not None and one.lifted is not None and abs(one.scale) > WORKABLE[0]:
            up = one.up[first - one.place.first :][: len(margins)]
            self.factors = up, one.down
            if lifted:
                self.factors = torch.cat([up, self.column(up) / one.scale], 1), one.lifted

    def column(self, like: Tensor) -> Tensor:
        """The margins, (n, 1)."""
        if self.columns is None:
            self.columns = torch.from_numpy(self.margins).to(like)[:, None]
        return self.columns

    def add(self, change: Tensor, offset: int) -> None:
        """Make `change` what is added to a tile's rows, from the one at `offset` on; lifted by their margins if asked."""
        if self.factors is not None:
            up, down = self.factors
            change.addmm_(up[offset : offset + len(change)], down, beta=0, alpha=self.stacks[0].scale)
            return
        if self.lifted:
            change.copy_(self.column(change)[offset : offset + len(change)].expand_as(change))
        else:
            change.zero_()
        for stack in self.stacks:
            if stack.place.meets(self.first + offset, self.first + offset + len(change)):
                stack.add_to(change, self.first + offset)


def rounded_by_way_of_float32(sums: Tensor, margin: float, result: Tensor) -> Places:
    """Round float64 to 16 bits into `result`, and tell where another result is possible, give or take a margin."""
    single = sums.to(torch.float32)
    result.copy_(single)
    tie = tie_of(result.dtype)
    # whatever float32 is not at a tie is half a step of float32 away from one, and that is more than the margin
    near = (bits_of(single) & (2 * tie - 1)) == tie
    near |= single.abs_() < max(margin / FAR, alike_from(result.dtype))
    return places_of(near)


def places_of(found: Tensor) -> Places:
    """Where a matrix is true, in its flat order."""
    if found.device.type == "cpu":
        return numpy.flatnonzero(found.numpy())
    places: Places = torch.nonzero(found.view(-1)).flatten().cpu().numpy()
    return places


def convert(values: Tensor, dtype: torch.dtype, finite: bool) -> Tensor:
    """Numbers in another dtype, each the one next to it; a NaN is spelled in one way on every machine."""
    rounded = round_once(values, dtype)
    return rounded if finite else rounded.masked_fill(values.isnan(), math.nan)


def largest_of(values: Tensor) -> float:
    """The size of the largest; not finite where any is not."""
    if values.is_cuda or values.element_size() != 2 or not values.is_contiguous():
        lowest, highest = torch.aminmax(values)
        return max(-float(lowest), float(highest))
    positive = negative = 0
    bits = bits_of(values).numpy().reshape(-1)  # numpy does this several times faster than torch on a CPU
    for at in range(0, bits.size, CACHED):
        some = bits[at : at + CACHED]
        positive, negative = max(positive, int(some.max())), max(negative, int(some.view(numpy.uint16).max()))
    size = max(positive, negative & 0x7FFF if negative >= 0x8000 else 0)  # the sign is the highest bit
    return float(torch.tensor(size, dtype=torch.int16).view(values.dtype))


def working_dtype(parts: Sequence[Part], target: torch.dtype, exact: torch.dtype, elements: int) -> torch.dtype:
    """Float32 where it holds every W as it is and is faster, the target is narrower, and no scale or factor is far from 1."""
    on_gpu = any(part.up.is_cuda for part in parts)
    if target.itemsize != 2 or exact == torch.float64 or on_gpu or elements <= SMALL:
        return torch.float64
    sizes = [abs(part.scale) for part in parts if part.scale]
    for part in parts:
        sizes += [float(f.abs().max()) for f in (part.up, part.down) if f is not None and f.numel()]
    small, large = WORKABLE
    return torch.float32 if all(size < large and (size > small or size == 0) for size in sizes) else torch.float64


def differing(room: Tile, lower: Tensor, unequal: NDArray[numpy.bool_]) -> Places:
    """Places in which the bits of the upper end of a tile are not those of the lower one; `unequal` is memory."""
    if not room.arrays:
        return places_of(bits_of(room.upper) != bits_of(lower))
    first, second = room.arrays[2], bits_of(lower).numpy().reshape(-1)
    each = 8 // first.itemsize
    if first.size % each:
        return numpy.flatnonzero(first != second)
    eights = first.view(numpy.int64), second.view(numpy.int64)  # few differ: look at eight bytes at a time
    found = numpy.flatnonzero(numpy.not_equal(*eights, out=unequal[: eights[0].size]))
    others = numpy.flatnonzero((eights[0][found] ^ eights[1][found]).view(first.dtype))
    places: Places = found[others // each] * each + others % each
    return places
