"""Single elements of W + Σ scale · up @ down, which a sum in the working dtype leaves undecided.

They are computed in float64, with a bound again (`kernels.settle`), and what that leaves open in error-free sums
(`algebra.rounding`). There are few of them, so the CPU does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.algebra.rounding import Term, bits_of, exact_sums, round_once
from loratool.lazy import NDArray, Tensor, numpy, torch
from loratool.merging.addends import Addend, Stack
from loratool.merging.bounds import TINIEST

if TYPE_CHECKING:
    Places = NDArray[numpy.int64]

TOGETHER = 1 << 17  # products that are computed at a time


class SingleElements:
    """All parts of one weight, at single elements. A place is that of an element in the flat weight."""

    def __init__(self, parts: Sequence[Addend], stacks: Sequence[Stack], width: int, target: torch.dtype) -> None:
        self.parts, self.stacks, self.width, self.target = parts, stacks, width, target
        self.rank = sum(part.rank for part in parts)

    def rounded(self, places: Tensor, sums: Tensor, weights: Tensor, margins: Tensor) -> Tensor:
        """The results, (count,) of the target dtype; everything is on the CPU.

        Args:
            places: (count,) in the flat weight.
            sums: (count,) W + ΔW in float64.
            weights: (count,) W, all finite.
            margins: (count,) half the length of the interval, in float64.
        """
        if self.target == torch.float64:
            return self.exactly(places, weights)
        result, left = within(sums, margins, self.target)
        if len(left):
            result[left] = self.exactly(places[left], weights[left])
        return result

    def factors_in(self, first: int, count: int) -> list[tuple[Tensor, Tensor, float, list[int]]]:
        """All parts that meet rows from `first` on, as `kernels.settle` takes them."""
        meeting = (part for part in self.parts if part.place.meets(first, first + count))
        return [(*part.factors, float(part.scale), part.place.frame) for part in meeting]

    @cached_property
    def least(self) -> float:
        """What underflow may take from a term in float64."""
        return TINIEST[8] + sum(each.underflow for each in self.stacks)

    @property
    def together(self) -> int:
        """Elements that are computed at a time."""
        return max(1, TOGETHER // max(self.rank, 1))

    def exactly(self, places: Tensor, weights: Tensor) -> Tensor:
        """Results of error-free sums."""
        results = []
        for some, values in zip(torch.split(places, self.together), torch.split(weights, self.together), strict=True):
            rows, columns = self.split(some.numpy())
            factors = [(*part.factors_at(rows, columns), part.scale) for part in self.parts]
            terms: list[Term] = [(left.T, right.T, scale) for left, right, scale in factors]
            results.append(exact_sums(values.double().numpy(), terms, self.target))
        return torch.cat(results)

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


def within(values: Tensor, errors: Tensor, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in float64, each give or take its error, rounded once; and the numbers of those that may go either way."""
    low, high = round_once(values - errors, target), round_once(values + errors, target)
    return low, torch.nonzero(bits_of(low) != bits_of(high)).view(-1)
