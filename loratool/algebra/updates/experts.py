"""Updates of expert parameters: one three-dimensional weight that holds a matrix for each expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import ANY, Product, Update, passed
from loratool.lazy import Tensor, torch


def downs(a: Tensor, experts: int) -> Tensor:
    """A of every expert, (experts, rank, ·): stored so, or expert-major as (experts · rank, ·) (row e·r + k).

    One for all experts, (1, rank, ·), stays one.
    """
    return a if len(a.shape) == 3 else a.reshape(experts, -1, a.shape[1])


def ups(b: Tensor, experts: int, grouped: bool) -> Tensor:
    """B of every expert, (experts, ·, rank): stored so, or with the experts' columns side by side in one matrix.

    In a matrix (·, rank · experts) they are rank-major (column k·E + e), or `grouped` by expert (column e·r + k).
    """
    if len(b.shape) == 3:
        return b
    if grouped:
        return b.reshape(b.shape[0], experts, -1).permute(1, 0, 2)
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


@dataclass(frozen=True)
class ExpertLowRank(Update):
    """ΔW[e] = scale · P_e, or its transpose, with P_e = B_e @ A_e (`target_parameters` of PEFT 0.21)."""

    a: Tensor  # as `downs` takes it
    b: Tensor  # as `ups` takes it
    experts: int
    scale: float
    transposed: bool  # the weight of an expert is P_eᵀ
    grouped: bool = False

    fold = 2
    adds_products = True

    @property
    def shape(self) -> tuple[int, ...]:
        p = (self.b.shape[-2], self.a.shape[-1])
        return (self.experts, *(p[::-1] if self.transposed else p))

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """(up, down) of one expert's ΔW / scale."""
        every = downs(self.a, self.experts), ups(self.b, self.experts, self.grouped)
        down, up = (each[expert if each.shape[0] > 1 else 0] for each in every)
        return (down.T, up.T) if self.transposed else (up, down)

    def delta(self, weight: Tensor) -> Tensor:
        every = [torch.matmul(*self.factors(expert)) for expert in range(self.experts)]
        return (self.scale * torch.stack(every)).to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        for expert, within, own in passed(first_row, rows.shape[0], self.shape[1]):
            up, down = self.factors(expert)
            part = rows[own]
            part.addmm_(up[within : within + len(part)], down, alpha=self.scale * strength)

    def norm(self) -> float:
        squared = 0.0
        for expert in range(self.experts):
            up, down = (factor.double() for factor in self.factors(expert))
            squared += float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))

    def products(self, columns: int) -> tuple[Product, ...]:  # noqa: ARG002
        every = (self.factors(expert) for expert in range(self.experts))
        return tuple(Product(number * self.shape[1], up, down, self.scale) for number, (up, down) in enumerate(every))


@dataclass(frozen=True)
class ExpertFactors(Update):
    """A and B of a parameter before it is known how many experts it has; `fit` makes the update of them."""

    a: Tensor  # as `downs` takes it
    b: Tensor  # as `ups` takes it
    alpha: float
    rslora: bool = False
    ranks: tuple[int, ...] = ()  # of one expert, as the config may mean them
    grouped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, ANY, ANY)

    @property
    def stacked(self) -> bool:
        """Whether both factors have a dimension for the experts."""
        return len(self.a.shape) == 3

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of P_e."""
        return self.b.shape[-2], self.a.shape[-1]

    @property
    def experts(self) -> int | None:
        """How many there are, where that is known without the weight."""
        if self.stacked:
            count = max(self.a.shape[0], self.b.shape[0])
            return count if count > 1 else None
        found = {self.a.shape[0] // rank for rank in self.ranks}
        return next(iter(found)) if len(found) == 1 else None

    def rank_of(self, experts: int) -> int:
        """Of one expert."""
        return self.a.shape[1] if self.stacked else self.a.shape[0] // experts

    def divides(self, experts: int) -> bool:
        """Whether the factors can be those of so many experts."""
        if self.stacked:
            return experts > 0 and {self.a.shape[0], self.b.shape[0]} <= {1, experts}
        return experts > 0 and self.a.shape[0] == self.b.shape[1] and self.a.shape[0] % experts == 0

    def orientations(self, shape: tuple[int, ...]) -> frozenset[bool]:
        """The values of `transposed` with which A and B fit a (experts, ·, ·) weight; both where it is square."""
        p = self.sides
        found = [transposed for transposed in (False, True) if shape[1:] == (p[::-1] if transposed else p)]
        return frozenset(found if self.divides(shape[0]) else [])

    def fit(self, shape: tuple[int, ...], transposed: bool | None = None) -> Update | None:
        """The update for a (experts, ·, ·) weight, or for a matrix; `transposed` decides where it is square.

        A square weight of unknown orientation gives None, as one that A and B do not fit.
        """
        matrix = len(shape) == 2 and not self.stacked
        found = self.orientations((1, *shape) if matrix else shape) if matrix or len(shape) == 3 else frozenset()
        if transposed is not None:
            found &= {transposed}
        if matrix and False in found:
            found = frozenset([False])
        if len(found) != 1:
            return None
        (turned,) = found
        experts = 1 if matrix else shape[0]
        rank = self.rank_of(experts)
        scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
        if matrix:
            update = LowRank(self.b, self.a, scale)
            return update.turned if turned else update
        return ExpertLowRank(self.a, self.b, experts, scale, turned, self.grouped)
