"""W + Σ scale · up @ down, each element the number next to the exact value: the same bytes on every machine.

A product in the working dtype comes with a bound of its error. Where both ends of the interval that the exact value
lies in round to the same number, that is the result; the few other elements are computed anew in float64, with a bound
again, and what that leaves open is decided by error-free sums (`algebra.rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.algebra.rounding import Term, bits_of, exact_sums, round_once
from loratool.algebra.updates.base import Product
from loratool.lazy import Tensor, numpy, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALL = slice(None)
TOGETHER = 1 << 18  # products that are computed anew at a time
ROUNDOFF = {4: 2.0**-24, 8: 2.0**-53}  # by bytes of the dtype: half the distance from 1 to the next number
TINIEST = {4: 2.0**-124, 8: 2.0**-960}  # more than underflow takes from a number
GENEROUS = 1 + 2.0**-10  # times a bound: for the roundings in computing the bound itself
WORKABLE = 2.0**-60, 2.0**60  # sizes of scales and sums that float32 computes with


@dataclass(frozen=True)
class Part:
    """What one product adds to some rows and columns of a weight."""

    first: int  # row of the weight that the product's first row goes to
    columns: slice  # of the weight, as many as the product has
    up: Tensor  # (rows, rank)
    down: Tensor | None  # (rank, columns); where there is none, `up` are the values
    scale: float  # strength included

    @classmethod
    def of(cls, product: Product, first: int, at: int, rows: int, columns: slice, strength: float) -> Part | None:
        """The part of a product that goes to `rows` rows of a weight from `first` on, which are the update's from `at` on."""
        start = max(product.first, at)
        stop = min(product.first + product.up.shape[0], at + rows)
        if start >= stop:
            return None
        up = product.up[start - product.first : stop - product.first]
        return cls(first + start - at, columns, up, product.down, product.scale * strength)

    @property
    def stop(self) -> int:
        return self.first + self.up.shape[0]

    @property
    def rank(self) -> int:
        return self.up.shape[1] if self.down is not None else 1

    def factors_at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors of single elements in float64, (rank, count) each; zero for elements that are not this part's."""
        own = (rows - self.first).clamp(0, self.up.shape[0] - 1)
        inside = own == rows - self.first
        start, step = self.columns.start or 0, self.columns.step or 1
        count = (self.up if self.down is None else self.down).shape[1]
        across = columns if self.columns == ALL else ((columns - start) // step).clamp(0, count - 1)
        if self.columns != ALL:
            inside &= across * step + start == columns
        if self.down is None:
            left = self.up[own, across].double()[None]
            return left * inside, torch.ones_like(left)
        left = self.up.index_select(0, own).double().T
        return left * inside, self.down.index_select(1, across).double()


@dataclass(frozen=True)
class Stack:
    """The parts of one place as one product in the working dtype, with the lengths that bound its error."""

    first: int
    columns: slice
    up: Tensor  # (rows, rank)
    down: Tensor | None
    scale: float
    lengths: Tensor  # (rows,) of the rows of `up`, in float64; their largest elements where there is no `down`
    longest: float  # column of `down`
    count: int  # of the products

    @classmethod
    def of(cls, parts: Sequence[Part], work: torch.dtype) -> Stack:
        """One product of parts of the same place; each factor is rounded once at most."""
        one = parts[0]
        scale = one.scale if len(parts) == 1 else 1.0
        scaled = [part.up if len(parts) == 1 else (part.up.double() * part.scale) for part in parts]
        if one.down is None:
            up, down = sum(scaled[1:], scaled[0]).to(work), None
            lengths = torch.stack([each.double().abs().amax(1) for each in scaled]).sum(0)
            return cls(one.first, one.columns, up, down, scale, lengths, 1.0, len(parts))
        up = torch.cat(scaled, 1).to(work)
        down = torch.cat([part.down for part in parts if part.down is not None], 0).to(work)
        longest = float(torch.linalg.vector_norm(down.double(), dim=0).max()) if down.numel() else 0.0
        lengths = torch.linalg.vector_norm(up.double(), dim=1)
        return cls(one.first, one.columns, up, down, scale, lengths, longest, up.shape[1])

    @property
    def stop(self) -> int:
        return self.first + self.up.shape[0]

    def reach(self, first: int, count: int) -> float:
        """No element of some rows of the product is larger, and no sum of the sizes of what it is the sum of."""
        lengths = self.lengths[max(first - self.first, 0) : first + count - self.first]
        return float(lengths.max()) * self.longest * abs(self.scale) * GENEROUS

    def add_to(self, rows: Tensor, first: int, fresh: bool) -> None:
        """Add some rows of the product to `rows`, which begin at row `first`; `fresh` ones hold nothing yet."""
        start, stop = max(first, self.first), min(first + rows.shape[0], self.stop)
        place = rows[start - first : stop - first, self.columns]
        up = self.up[start - self.first : stop - self.first]
        if self.down is None:
            if fresh:
                torch.mul(up, self.scale, out=place)
            else:
                place.add_(up, alpha=self.scale)
        else:
            place.addmm_(up, self.down, beta=0 if fresh else 1, alpha=self.scale)


@dataclass
class Seen:
    """What was seen of a block of rows."""

    weight: float = 0.0  # ‖W‖²
    change: float = 0.0  # ‖ΔW‖²
    largest: float = 0.0  # no element of the result is larger in size
    places: list[Tensor] = field(default_factory=list)  # of elements that are not decided yet, in the flat block
    values: list[Tensor] = field(default_factory=list)  # of W there, in float64


class Scratch:
    """Memory for one piece of a block after the other."""

    def __init__(self, device: torch.device, elements: int, itemsize: int) -> None:
        self.weight, self.change = (
            torch.empty(elements * itemsize, dtype=torch.uint8, device=device) for _ in range(2)
        )
        self.upper = torch.empty(elements * 4, dtype=torch.uint8, device=device)
        self.unequal = numpy.empty(elements if device.type == "cpu" else 0, numpy.bool_)

    def of(self, memory: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Some of it as a matrix; new memory where it is too little."""
        size = rows * width * dtype.itemsize
        if size > len(memory):
            return torch.empty(rows, width, dtype=dtype, device=memory.device)
        return memory[:size].view(dtype).view(rows, width)


class ExactSum:
    """All parts of one weight, ready on one device."""

    def __init__(self, parts: Iterable[Part], target: torch.dtype, exact: torch.dtype) -> None:
        """`exact` is a dtype that holds every element of W as it is, float32 or float64."""
        self.parts = tuple(parts)
        self.target = target
        self.work = working_dtype(self.parts, target, exact)
        groups: dict[tuple[object, ...], list[Part]] = {}
        for part in self.parts:
            place = (part.first, part.up.shape[0], str(part.columns), part.down is None)
            groups.setdefault(place, []).append(part)
        self.stacks = tuple(Stack.of(group, self.work) for group in groups.values())

    def merge(self, weight: Tensor, first: int, after: Tensor, scratch: Scratch, seen: Seen, measure: bool) -> None:
        """Put W + ΔW of some rows into `after`, but for the elements that `seen` gathers for `settle`.

        Args:
            weight: (n, width), rows from `first` on, in the working dtype; it is left as it is.
            first: the first row.
            after: (n, width) of the target dtype.
            scratch: memory.
            seen: gathers what was seen.
            measure: whether ‖ΔW‖ is wanted.
        """
        count, width = weight.shape
        stacks = [each for each in self.stacks if each.first < first + count and each.stop > first]
        if not stacks:
            after.copy_(round_once(weight, self.target))
            seen.largest = math.inf  # nobody looked
            return
        change = scratch.of(scratch.change, count, width, self.work)
        whole = stacks[0].first <= first and stacks[0].stop >= first + count and stacks[0].columns == ALL
        if not whole:
            change.zero_()
        for number, stack in enumerate(stacks):
            stack.add_to(change, first, fresh=whole and number == 0)
        if measure:
            seen.change += float(torch.linalg.vector_norm(change)) ** 2
        reach = sum(stack.reach(first, count) for stack in stacks)
        lowest, highest = torch.aminmax(weight)
        size = max(-float(lowest), float(highest))
        rows, odd = weight, None
        if not math.isfinite(size):
            odd = weight.isfinite().logical_not_()
            weight = weight.masked_fill(odd, 0)
            size = float(weight.abs().max())
        largest = size + reach
        seen.largest = max(seen.largest, math.inf if odd is not None else largest)
        margin = self.margin(stacks, reach, largest)
        if self.target == torch.float64:
            unsure = torch.arange(count * width, device=after.device)
        else:
            upper = scratch.of(scratch.upper, count, width, self.target)
            change.add_(weight).add_(margin)
            upper.copy_(change)
            after.copy_(change.sub_(2 * margin))
            unsure = differing(upper, after, scratch.unequal)
        if odd is not None:
            after[odd] = rows[odd].to(self.target)
            after[rows.isnan()] = math.nan  # of one spelling on every machine
            unsure = unsure[odd.flatten()[unsure].logical_not()]
        if len(unsure):
            seen.places.append(unsure + first * width)
            seen.values.append(weight.flatten()[unsure].double())

    def margin(self, stacks: Sequence[Stack], reach: float, largest: float) -> float:
        """How far the sum in the working dtype may be from the exact value, both ends' own roundings included."""
        unit = ROUNDOFF[self.work.itemsize]
        terms = sum(stack.count + 6 for stack in stacks)
        product = terms * unit * reach
        product += sum(
            terms * TINIEST[self.work.itemsize] * (1 + abs(each.scale)) * (1 + each.longest) for each in stacks
        )
        step = 4 * unit
        if self.work == torch.float64 and self.target.itemsize == 2:  # torch goes by way of float32
            step += 2 * ROUNDOFF[4]
        return (product + step * largest) * GENEROUS

    def settle(self, width: int, places: Tensor, weights: Tensor) -> Tensor:
        """The results of single elements, (count,) of the target dtype.

        Args:
            width: columns of the weight.
            places: (count,) in the flat weight.
            weights: (count,) of W there, in float64, all finite.
        """
        rank = sum(part.rank for part in self.parts)
        pieces = [torch.split(each, max(1, TOGETHER // max(rank, 1))) for each in (places, weights)]
        return torch.cat([self.settle_few(width, *piece) for piece in zip(*pieces, strict=True)])

    def settle_few(self, width: int, places: Tensor, weights: Tensor) -> Tensor:
        rows, columns = places // width, places % width
        lowest, highest = (int(rows.min()), int(rows.max())) if len(self.parts) > 1 else (0, 0)
        parts = [p for p in self.parts if len(self.parts) == 1 or (p.first <= highest and p.stop > lowest)]
        factors = [(*part.factors_at(rows, columns), part.scale) for part in parts]
        value, size = weights.clone(), weights.abs()
        for left, right, scale in factors:
            products = left * right
            value += products.sum(0) * scale
            size += products.abs().sum(0) * abs(scale)
        terms = sum(left.shape[0] + 4 for left, _, _ in factors) + 4
        error = size * (terms * ROUNDOFF[8] * GENEROUS) + terms * TINIEST[8]
        result, upper = round_once(value - error, self.target), round_once(value + error, self.target)
        still = size == weights.abs()
        result[still] = round_once(weights[still], self.target)
        open_yet = torch.nonzero((bits_of(result) != bits_of(upper)) & ~still).flatten()
        if len(open_yet):
            terms_there: list[Term] = [
                (left[:, open_yet].cpu().numpy(), right[:, open_yet].cpu().numpy(), scale)
                for left, right, scale in factors
            ]
            exact = exact_sums(weights[open_yet].cpu().numpy(), terms_there, self.target)
            result[open_yet] = exact.to(result.device)
        return result


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
    found = room[: first.size // each]  # few differ: look at eight bytes at a time
    numpy.not_equal(first.view(numpy.int64), second.view(numpy.int64), out=found)
    places = (numpy.flatnonzero(found)[:, None] * each + numpy.arange(each)).ravel()
    return torch.from_numpy(places[first[places] != second[places]])
