"""W + Σ scale · up @ down, each element the number next to the exact value: the same bytes on every machine.

A product in the working dtype comes with a bound of its error. Where both ends of the interval that the exact value
lies in round to the same number, that is the result; the few other elements are computed anew in float64, with a bound
again, and what that leaves open is decided by error-free sums (`algebra.rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.algebra.rounding import Term, bits_of, exact_sums, round_once
from loratool.files.stopwatch import lap
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.parts import GENEROUS, TINIEST, Part, Stack, by_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOGETHER = 1 << 18  # products that are computed anew at a time
DECIDED_TOGETHER = 1 << 16  # elements
MANY = 16  # where more than one of so many elements is undecided, it is asked whether anything is added to them
MOST_VIEWS = 64
ROUNDOFF = {4: 2.0**-24, 8: 2.0**-53}  # by bytes of the dtype: half the distance from 1 to the next number
TIES = {True: 0x8000, False: 0x1000}  # last bits of a float32 that is half-way between two of bfloat16, or of float16
NORMAL = 2.0**-14  # the smallest size of which that is true for float16
WORKABLE = 2.0**-60, 2.0**60  # sizes of scales and sums that float32 computes with


@dataclass
class Seen:
    """What was seen of a block of rows."""

    weight: float = 0.0  # ‖W‖²
    change: float = 0.0  # ‖ΔW‖²
    largest: float = 0.0  # no element of the result is larger in size
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # of sampled rows: module → as `Totals.kept`


class Scratch:
    """Memory for some rows after the other."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.elements = elements
        every = (elements * itemsize, elements * itemsize, elements * 4)
        self.weight, self.change, self.upper = (torch.empty(n, dtype=torch.uint8, device=device) for n in every)
        self.unequal = numpy.empty(elements if device.type == "cpu" else 0, numpy.bool_)
        self.views: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def of(self, rows: int, width: int, work: torch.dtype, target: torch.dtype) -> tuple[Tensor, ...]:
        """Matrices for the weight and for the change, in the working dtype, and for one end of the result."""
        key = rows, width, work, target
        if key not in self.views:
            if len(self.views) > MOST_VIEWS:
                self.views.clear()
            every = ((self.weight, work), (self.change, work), (self.upper, target))
            self.views[key] = tuple(matrix_in(memory, rows, width, dtype) for memory, dtype in every)
        return self.views[key]


def matrix_in(memory: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Some memory as a matrix; new memory where it is too little."""
    size = rows * width * dtype.itemsize
    if size > memory.numel():
        return torch.empty(rows, width, dtype=dtype, device=memory.device)
    return memory[:size].view(dtype).view(rows, width)


@dataclass
class Undecided:
    """Elements of some rows that may be rounded either way."""

    margin: float = 0.0  # that they were found with, at most
    places: list[Tensor] = field(default_factory=list)  # in the flat rows
    sums: list[Tensor] = field(default_factory=list)  # of W and ΔW, in the working dtype
    weights: list[Tensor] = field(default_factory=list)  # of W


class ExactSum:
    """All parts of one weight, ready on one device."""

    def __init__(self, parts: Iterable[Part], width: int, target: torch.dtype, exact: torch.dtype) -> None:
        """`width` is that of the weight; `exact` a dtype that holds every element of W as it is, float32 or float64."""
        self.parts, self.width, self.target, self.exact = tuple(parts), width, target, exact
        self.work = working_dtype(self.parts, target, exact)
        self.stacks = tuple(Stack.of(group, self.work) for group in by_place(self.parts))
        self.unit = ROUNDOFF[self.work.itemsize]
        self.step = 2 * self.unit  # of a sum's size: what its rounding takes, and that of the other end
        if self.work == torch.float64 and target.itemsize == 2:  # torch goes by way of float32
            self.step += 2 * ROUNDOFF[4]
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
        seen, open_yet = Seen(), Undecided()
        for at in range(0, before.shape[0], tile):
            stored, lower = before[at : at + tile], after[at : at + tile]
            count, begin = stored.shape[0], first + at
            weight, change, upper = scratch.of(count, self.width, self.work, self.target)
            weight.copy_(stored)
            lap("cast")
            seen.weight += float(torch.linalg.vector_norm(weight)) ** 2
            if substitute is not None:
                substitute(weight, begin)
            size = largest_of(weight if substitute else stored)
            odd = None if math.isfinite(size) else weight.isfinite().logical_not_()
            if odd is not None:
                kept = convert(weight, self.target, finite=False)
                size = largest_of(weight.masked_fill_(odd, 0))
            stacks = [each for each in self.stacks if each.place.meets(begin, begin + count)]
            largest = size + sum(stack.reach for stack in stacks)
            unsure = None
            lap("measure")
            if not stacks:
                lower.copy_(round_once(weight, self.target))
            else:
                margin = self.margin(stacks, largest)
                lift = 0.0 if measure else margin
                add(stacks, change, begin, lift)
                if measure:
                    seen.change += float(torch.linalg.vector_norm(change)) ** 2
                    change.add_(margin)
                lap("product")
                unsure = self.round(change.add_(weight), margin, lower, upper, scratch)
                if len(unsure) > lower.numel() // MANY:
                    unsure = unsure[self.changing(stacks, begin, weight, lower)[unsure // self.width]]
            if odd is not None:
                lower.copy_(torch.where(odd, kept, lower))
                unsure = unsure if unsure is None else unsure[odd.view(-1)[unsure].logical_not_()]
                largest = math.inf
            seen.largest = max(seen.largest, largest)
            if unsure is not None and len(unsure):
                open_yet.margin = max(open_yet.margin, margin)
                open_yet.places.append(unsure + at * self.width)
                open_yet.sums.append(change.view(-1)[unsure].add_(margin))
                open_yet.weights.append(weight.view(-1)[unsure])
            lap("round")
        if open_yet.places:
            self.decide(after.view(-1), first, open_yet)
            lap("settle")
        return seen

    @cached_property
    def wide(self) -> ExactSum:
        """The same, computed in float64."""
        return ExactSum(self.parts, self.width, self.target, torch.float64)

    def sums(self, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """W + ΔW of some rows, from `first` on, in the working dtype, and how far each may be from the exact value."""
        count = weight.shape[0]
        stacks = [each for each in self.stacks if each.place.meets(first, first + count)]
        change, errors = torch.zeros_like(weight), torch.zeros_like(weight)
        for stack in stacks:
            stack.add_to(change, first)
            start, stop = max(first, stack.place.first), min(first + count, stack.place.stop)
            lengths = stack.lengths[start - stack.place.first : stop - stack.place.first]
            part = errors[start - first : stop - first, stack.place.columns]
            part += lengths[:, None] * stack.spans * (abs(stack.scale) * stack.terms * GENEROUS)
        sizes = torch.where(errors != 0, weight.abs() + change.abs() + errors, 0)
        errors = (errors + 4 * sizes) * (self.unit * GENEROUS) + (errors != 0) * self.underflow
        return change.add_(weight), errors

    def exact_value(self, weights: Tensor, start: int, at: int) -> Fraction:
        """W + ΔW of one element: the one `at` places after place `start` of the flat weight, whose W is `weights[at]`."""
        row, column = divmod(start + at, self.width)
        rows, columns = (torch.tensor([each], device=weights.device) for each in (row, column))
        value = Fraction(float(weights[at]))
        for part in self.parts:
            left, right = (factor[0].tolist() for factor in part.factors_at(rows, columns))
            products = (Fraction(one) * Fraction(other) for one, other in zip(left, right, strict=True))
            value += Fraction(part.scale) * sum(products, Fraction(0))
        return value

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

    def margin(self, stacks: Sequence[Stack], largest: float) -> float:
        """How far a sum in the working dtype may be from the exact value, both ends' own roundings included."""
        product = sum(stack.terms * stack.reach for stack in stacks) * self.unit
        return (product + self.underflow + self.step * largest) * GENEROUS

    def round(self, sums: Tensor, margin: float, lower: Tensor, upper: Tensor, scratch: Scratch) -> Tensor:
        """Round both ends of intervals, and tell where they differ; `sums` come as the upper ends, and go as the lower."""
        if self.target == torch.float64:
            return torch.arange(sums.numel(), device=sums.device)
        upper.copy_(sums)
        lower.copy_(sums.sub_(2 * margin))
        return differing(upper, lower, scratch.unequal)

    def changing(self, stacks: Sequence[Stack], first: int, weight: Tensor, lower: Tensor) -> Tensor:
        """The rows to which anything is added, as (n,) of bool; the others are put into `lower`."""
        changing = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        for stack in stacks:
            start, stop = max(first, stack.place.first), min(first + weight.shape[0], stack.place.stop)
            lengths = stack.lengths[start - stack.place.first : stop - stack.place.first]
            changing[start - first : stop - first] |= lengths != 0
        still = changing.logical_not()
        lower[still] = round_once(weight[still], self.target)
        return changing

    def decide(self, after: Tensor, first: int, open_yet: Undecided) -> None:
        """Put the results of undecided elements into `after`, which holds rows from `first` on, flat."""
        every = (torch.cat(each) for each in (open_yet.places, open_yet.sums, open_yet.weights))
        for pieces in zip(*(torch.split(each, DECIDED_TOGETHER) for each in every), strict=True):
            self.decide_some(after, first, open_yet.margin, *pieces)

    def decide_some(
        self, after: Tensor, first: int, margin: float, places: Tensor, sums: Tensor, weights: Tensor
    ) -> None:
        if self.target != torch.float64:
            rows = places // self.width
            columns = places - rows * self.width
            rows += first
            near = (self.step + 2 * self.unit) * GENEROUS
            error = sums.abs().mul_(near).add_((self.underflow + 16 * self.unit * margin) * GENEROUS)
            for stack in self.near(rows):
                error.add_(stack.sizes_at(rows, columns), alpha=(stack.terms * self.unit + near) * GENEROUS)
            result = round_once(sums - error, self.target)
            left = torch.nonzero(bits_of(result) != bits_of(round_once(sums + error, self.target))).flatten()
            after[places] = result
            places, weights = places[left], weights[left]
        if len(places):
            after[places] = self.settle(places + first * self.width, weights.double())

    def near(self, rows: Tensor) -> Sequence[Stack]:
        """The stacks that rows may be in."""
        if len(self.stacks) == 1:
            return self.stacks
        lowest, highest = int(rows.min()), int(rows.max())
        return [each for each in self.stacks if each.place.meets(lowest, highest + 1)]

    def settle(self, places: Tensor, weights: Tensor) -> Tensor:
        """The results of single elements, (count,) of the target dtype.

        Args:
            places: (count,) in the flat weight.
            weights: (count,) of W there, in float64, all finite.
        """
        rank = sum(part.rank for part in self.parts)
        pieces = [torch.split(each, max(1, TOGETHER // max(rank, 1))) for each in (places, weights)]
        return torch.cat([self.settle_few(*piece) for piece in zip(*pieces, strict=True)])

    def settle_few(self, places: Tensor, weights: Tensor) -> Tensor:
        rows = places // self.width
        columns = places - rows * self.width
        lowest, highest = int(rows.min()), int(rows.max())
        parts = [part for part in self.parts if part.place.meets(lowest, highest + 1)]
        factors = [(*part.factors_at(rows, columns), part.scale) for part in parts]
        value, added = weights.clone(), torch.zeros_like(weights)
        for stack in self.near(rows):
            added += stack.sizes_at(rows, columns)
        for left, right, scale in factors:
            value.add_((left * right).sum(1), alpha=scale)
        terms = sum(left.shape[1] + 4 for left, _, _ in factors) + 4
        slack = terms * (TINIEST[8] + self.underflow)
        error = added.add_(weights.abs()).mul_(terms * ROUNDOFF[8] * GENEROUS).add_(slack)
        result, open_yet = round_within(value, error, self.target)
        if len(open_yet):
            terms_there: list[Term] = [
                (left[open_yet].T.cpu().numpy(), right[open_yet].T.cpu().numpy(), scale)
                for left, right, scale in factors
            ]
            exact = exact_sums(weights[open_yet].cpu().numpy(), terms_there, self.target)
            result[open_yet] = exact.to(result.device)
        return result


def round_within(values: Tensor, errors: Tensor, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in float64, each give or take its error, rounded once; and the places of those that may go either way."""
    if target.itemsize != 2:
        result = round_once(values - errors, target)
        return result, torch.nonzero(bits_of(result) != bits_of(round_once(values + errors, target))).flatten()
    single = values.to(torch.float32)
    result, tie = single.to(target), TIES[target == torch.bfloat16]
    # whatever float32 is not at a tie is half a step of float32 away from one, and more than its error
    near = (bits_of(single) & (2 * tie - 1)) == tie
    near |= (errors > single.abs().double() * 2.0**-26) | (single.abs() < NORMAL)
    few = torch.nonzero(near).flatten()
    if not len(few):
        return result, few
    lower, upper = round_once(values[few] - errors[few], target), round_once(values[few] + errors[few], target)
    result[few] = lower
    return result, few[bits_of(lower) != bits_of(upper)]


def add(stacks: Sequence[Stack], change: Tensor, first: int, lift: float) -> None:
    """Make `change` the sum of some rows of the stacks, from row `first` on, and of a constant."""
    one, count = stacks[0], change.shape[0]
    if len(stacks) == 1 and one.lifted is not None and one.covers(first, count) and abs(one.scale) > WORKABLE[0]:
        up = one.up.new_empty(count, one.lifted.shape[0])
        up[:, :-1] = one.up[first - one.place.first : first - one.place.first + count]
        up[:, -1] = lift / one.scale
        change.addmm_(up, one.lifted, beta=0, alpha=one.scale)
        return
    change.fill_(lift)
    for stack in stacks:
        stack.add_to(change, first)


def convert(values: Tensor, dtype: torch.dtype, finite: bool) -> Tensor:
    """Numbers in another dtype, each the one next to it; a NaN is spelled in one way on every machine."""
    rounded = round_once(values, dtype)
    return rounded if finite else rounded.masked_fill(values.isnan(), math.nan)


def largest_of(values: Tensor) -> float:
    """The size of the largest; not finite where any is not."""
    if values.is_cuda or values.element_size() != 2 or not values.is_contiguous():
        lowest, highest = torch.aminmax(values)
        return max(-float(lowest), float(highest))
    bits = bits_of(values).numpy()  # does this several times faster than torch on a CPU
    negative = int(bits.view(numpy.uint16).max())  # the sign is the highest bit
    size = max(int(bits.max()), negative & 0x7FFF if negative >= 0x8000 else 0)
    return float(torch.tensor(size, dtype=torch.int16).view(values.dtype))


def working_dtype(parts: Sequence[Part], target: torch.dtype, exact: torch.dtype) -> torch.dtype:
    """Float32 where it holds every W as it is, the target is narrower, and no scale or factor is far from 1."""
    if target.itemsize != 2 or exact == torch.float64:
        return torch.float64
    sizes = [abs(part.scale) for part in parts if part.scale]
    for part in parts:
        sizes += [float(f.abs().max()) for f in (part.up, part.down) if f is not None and f.numel()]
    small, large = WORKABLE
    return torch.float32 if all(size < large and (size > small or size == 0) for size in sizes) else torch.float64


def differing(one: Tensor, other: Tensor, room: NDArray[numpy.bool_]) -> Tensor:
    """Places in which the bits of two contiguous tensors differ."""
    one, other = bits_of(one).flatten(), bits_of(other).flatten()
    if one.device.type != "cpu":
        return torch.nonzero(one != other).flatten()
    first, second = one.numpy(), other.numpy()  # does this several times faster than torch on a CPU
    each = 8 // first.itemsize
    if first.size % each or first.ctypes.data % 8 or second.ctypes.data % 8:
        return torch.from_numpy(numpy.flatnonzero(first != second))
    eights = first.view(numpy.int64), second.view(numpy.int64)  # few differ: look at eight bytes at a time
    found = numpy.flatnonzero(numpy.not_equal(*eights, out=room[: eights[0].size]))
    unequal = numpy.flatnonzero((eights[0][found] ^ eights[1][found]).view(first.dtype))
    return torch.from_numpy(found[unequal // each] * each + unequal % each)
