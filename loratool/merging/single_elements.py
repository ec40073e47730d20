"""Single elements of W + Σ scale · up @ down, which a sum in the working dtype leaves undecided.

In float32 each gets a bound of its own; what that leaves open is computed in float64, with a bound again, and the rest
in error-free sums (`algebra.rounding`). It is done on the CPU, in numpy: there are few such elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loratool.algebra.rounding import FAR, Term, alike_from, bits_of, exact_sums, round_once, tie_of
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.parts import GENEROUS, ROUNDOFF, TINIEST, Part, Stack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[Any]  # of float32 or float64
    Numbers = NDArray[numpy.float64]
    Places = NDArray[numpy.int64]

TOGETHER = 1 << 18  # products that are computed at a time


class SingleElements:
    """All parts of one weight, at single elements. A place is that of an element in the flat weight."""

    def __init__(self, parts: Sequence[Part], stacks: Sequence[Stack], width: int, target: torch.dtype) -> None:
        self.parts, self.stacks, self.width, self.target = parts, stacks, width, target
        self.rank = sum(part.rank for part in parts)
        self.underflow = sum(stack.underflow for stack in stacks)

    def rounded(self, places: Places, sums: Values, weights: Values, margins: Numbers) -> Tensor:
        """The results, (count,) of the target dtype on the CPU.

        Args:
            places: (count,) in the flat weight.
            sums: (count,) W + ΔW in float64, or in float32 the lower ends of the intervals that hold it.
            weights: (count,) W, all finite.
            margins: (count,) half the length of the interval.
        """
        if self.target == torch.float64:
            return self.in_turn(self.exactly, places, weights)
        narrow = sums.dtype == numpy.float32
        wide = sums.astype(numpy.float64)
        result, left = self.by_own_bounds(places, wide, margins) if narrow else within(wide, margins, self.target)
        if len(left):
            settle = self.settled if narrow else self.exactly
            result[torch.from_numpy(left)] = self.in_turn(settle, places[left], weights[left])
        return result

    def by_own_bounds(self, places: Places, lowest: Numbers, margins: Numbers) -> tuple[Tensor, Places]:
        """Results of sums in float32 within bounds for each element; and which are open still."""
        unit = ROUNDOFF[4]
        rounding = 4 * unit  # of a size: of the sum, of its interval's lower end, and of the ends here
        rows, columns = self.split(places)
        sums = lowest + margins
        errors = numpy.abs(sums) * rounding + self.underflow
        for stack in self.stacks:
            errors += (stack.sizes_at(rows, columns) + margins) * (stack.terms * unit + rounding)
        errors *= GENEROUS
        low, high = (torch.from_numpy(each.astype(numpy.float32)) for each in (sums - errors, sums + errors))
        result = low.to(self.target)
        return result, numpy.flatnonzero((bits_of(result) != bits_of(high.to(self.target))).numpy())

    def settled(self, places: Places, weights: Values) -> Tensor:
        """Results in float64, and exact ones where that does not decide."""
        rows, columns = self.split(places)
        wide = weights.astype(numpy.float64)
        values, sizes = wide.copy(), numpy.abs(wide)
        terms = 4
        for part in self.parts:
            left, right = part.factors_at(rows, columns)
            values += numpy.einsum("ij,ij->i", left, right, dtype=numpy.float64) * part.scale
            terms += left.shape[1] + 4
        for stack in self.stacks:
            sizes += stack.sizes_at(rows, columns)
        errors = sizes * (terms * ROUNDOFF[8] * GENEROUS) + terms * (TINIEST[8] + self.underflow)
        result, left_over = within(values, errors, self.target)
        if len(left_over):
            result[torch.from_numpy(left_over)] = self.exactly(places[left_over], weights[left_over])
        return result

    def exactly(self, places: Places, weights: Values) -> Tensor:
        """Results of error-free sums."""
        rows, columns = self.split(places)
        terms: list[Term] = []
        for part in self.parts:
            left, right = part.factors_at(rows, columns)
            terms.append((left.T.astype(numpy.float64), right.T.astype(numpy.float64), part.scale))
        return exact_sums(weights.astype(numpy.float64), terms, self.target)

    def value(self, place: int, weight: float) -> Fraction:
        """The exact W + ΔW of one element."""
        rows, columns = self.split(numpy.array([place]))
        value = Fraction(weight)
        for part in self.parts:
            left, right = (factor[0].tolist() for factor in part.factors_at(rows, columns))
            products = (Fraction(one) * Fraction(other) for one, other in zip(left, right, strict=True))
            value += Fraction(part.scale) * sum(products, Fraction(0))
        return value

    def split(self, places: Places) -> tuple[Places, Places]:
        """Rows and columns."""
        rows = places // self.width
        return rows, places - rows * self.width

    def in_turn(self, compute: Callable[[Places, Values], Tensor], places: Places, weights: Values) -> Tensor:
        """What is computed of all elements, some at a time."""
        step = max(1, TOGETHER // max(self.rank, 1))
        starts = range(0, len(places), step)
        return torch.cat([compute(places[at : at + step], weights[at : at + step]) for at in starts])


def within(values: Numbers, errors: Numbers, target: torch.dtype) -> tuple[Tensor, Places]:
    """Values in float64, each give or take its error, rounded once; and those that may go either way."""
    single = values.astype(numpy.float32)
    result, few = torch.from_numpy(single).to(target), numpy.arange(len(values))
    if target.itemsize == 2:
        tie = tie_of(target)
        near = (single.view(numpy.int32) & (2 * tie - 1)) == tie
        near |= numpy.abs(values) < numpy.maximum(errors * (1.01 / FAR), alike_from(target))
        few = numpy.flatnonzero(near)
    if not len(few):
        return result, few
    low, high = (torch.from_numpy(values[few] + sign * errors[few]) for sign in (-1, 1))
    lower, upper = round_once(low, target), round_once(high, target)
    result[torch.from_numpy(few)] = lower
    return result, few[(bits_of(lower) != bits_of(upper)).numpy()]
