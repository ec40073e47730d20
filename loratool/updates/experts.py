"""Updates of expert parameters: one three-dimensional weight that holds a matrix for each expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.updates.additive import LowRank
from loratool.updates.base import ANY, Update

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class ExpertLowRank(Update):
    """ΔW[e] = scale · P_e, or its transpose, with P_e = B_e @ A_e (`target_parameters` of PEFT 0.21).

    A is stored expert-major (row e·r + k), B rank-major (column k·E + e).
    """

    a: Tensor  # (experts · rank, ·)
    b: Tensor  # (·, rank · experts)
    experts: int
    scale: float
    transposed: bool  # the weight of an expert is P_eᵀ

    fold = 2

    @property
    def shape(self) -> tuple[int, ...]:
        p = (self.b.shape[0], self.a.shape[1])
        return (self.experts, *(p[::-1] if self.transposed else p))

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """(up, down) of one expert's ΔW / scale."""
        each = self.a.shape[0] // self.experts
        down, up = self.a[expert * each : (expert + 1) * each], self.b[:, expert :: self.experts]
        return (down.T, up.T) if self.transposed else (up, down)

    def delta(self, weight: Tensor) -> Tensor:
        import torch

        every = [torch.matmul(*self.factors(expert)) for expert in range(self.experts)]
        return (self.scale * torch.stack(every)).to(weight.dtype)

    def parts(self, first_row: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """(expert, first row within it, rows) of the experts that a block of rows goes through."""
        each = self.shape[1]
        at = first_row
        while at < first_row + rows:
            expert, within = divmod(at, each)
            count = min(each - within, first_row + rows - at)
            yield expert, within, count
            at += count

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        at = 0
        for expert, within, count in self.parts(first_row, rows.shape[0]):
            up, down = self.factors(expert)
            rows[at : at + count].addmm_(up[within : within + count], down, alpha=self.scale * strength)
            at += count

    def norm(self) -> float:
        squared = 0.0
        for expert in range(self.experts):
            up, down = (factor.double() for factor in self.factors(expert))
            squared += float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))


@dataclass(frozen=True)
class ExpertFactors(Update):
    """A and B of a parameter before it is known how many experts it has; `fit` makes the update of them."""

    a: Tensor  # (experts · rank, ·)
    b: Tensor  # (·, rank · experts)
    alpha: float
    rslora: bool = False
    ranks: tuple[int, ...] = ()  # of one expert, as the config may mean them

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, ANY, ANY)

    def orientations(self, shape: tuple[int, ...]) -> frozenset[bool]:
        """The values of `transposed` with which A and B fit a (experts, ·, ·) weight; both where it is square."""
        p = (self.b.shape[0], self.a.shape[1])
        divides = shape[0] > 0 and self.a.shape[0] == self.b.shape[1] and self.a.shape[0] % shape[0] == 0
        found = [transposed for transposed in (False, True) if shape[1:] == (p[::-1] if transposed else p)]
        return frozenset(found if divides else [])

    def fit(self, shape: tuple[int, ...], transposed: bool | None = None) -> Update | None:
        """The update for a (experts, ·, ·) weight, or for a matrix; `transposed` decides where it is square.

        A square weight of unknown orientation gives None, as one that A and B do not fit.
        """
        matrix = len(shape) == 2
        found = self.orientations((1, *shape) if matrix else shape) if len(shape) in (2, 3) else frozenset()
        if transposed is not None:
            found &= {transposed}
        if matrix and False in found:
            found = frozenset([False])
        if len(found) != 1:
            return None
        (turned,) = found
        experts = 1 if matrix else shape[0]
        rank = self.a.shape[0] // experts
        scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
        if matrix:
            update = LowRank(self.b, self.a, scale)
            return update.turned if turned else update
        return ExpertLowRank(self.a, self.b, experts, scale, turned)
