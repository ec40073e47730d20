"""Weight-decomposed updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

from loratool.algebra.updates.base import Update, WeightRows, Wrapped
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Magnitude(Wrapped):
    """W' = m/‖W + ΔW‖ ⊙ (W + ΔW): DoRA (Liu et al. 2024, arXiv:2402.09353), by composition.

    The norm is that of each row, or of each column (`by_column`) where the weight is stored (in, out) or is an
    embedding table, and as LyCORIS and OneTrainer train it too. A column of a convolution is an input channel. The norm
    is taken with the unmerged weight, also where other updates came before. A row or column of norm 0 stays 0. At
    another strength W' lies on the line from W through the result at strength 1.
    """

    magnitude: Tensor  # (rows,), or (columns,) by column
    by_column: bool = False
    repeat: int = 1  # columns of the matrix for one of `magnitude`, once fitted
    norms: Tensor | None = None  # of W + ΔW by column, once prepared; as many as `magnitude`

    looks_at_base = True
    depends_on_weight = True

    @property
    def needs_weight(self) -> bool:
        return self.by_column or self.inner.needs_weight

    @property
    def turned(self) -> Magnitude:
        return replace(self, inner=self.inner.turned, by_column=not self.by_column)

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        inner = self.inner.fit(shape)
        if inner is None or self.magnitude.shape[0] != (shape[1] if self.by_column else shape[0]):
            return None
        return replace(self, inner=inner, repeat=math.prod(shape[2:]))

    def prepared(self, weight: WeightRows) -> Update:
        inner = self.inner.prepared(weight) if self.inner.needs_weight else self.inner
        if not self.by_column:
            return replace(self, inner=inner)

        def squares() -> Iterator[Tensor]:
            for first_row, base in weight():
                moved = base.clone()
                inner.add_rows(moved, first_row, 1.0, base)
                yield moved.double().square().sum(0)

        return replace(self, inner=inner, norms=reduce(torch.add, squares()).view(-1, self.repeat).sum(1).sqrt())

    def factor(self, norms: Tensor, magnitude: Tensor) -> Tensor:
        return (magnitude.to(norms.dtype) / norms).masked_fill(norms == 0, 0.0)

    def delta(self, weight: Tensor) -> Tensor:
        moved = weight + self.inner.delta(weight)
        kept = 1 if self.by_column and weight.dim() > 1 else 0
        norms = moved.transpose(0, kept).flatten(1).norm(dim=1)
        factor = self.factor(norms, self.magnitude).reshape(*[1] * kept, -1, *[1] * (weight.dim() - 1 - kept))
        return moved * factor - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        if self.by_column:
            assert self.norms is not None, "prepare the update first"
            factor = self.factor(self.norms, self.magnitude).to(rows.dtype).repeat_interleave(self.repeat)
        else:
            moved = base.clone()
            self.inner.add_rows(moved, first_row, 1.0, base)
            own = self.magnitude[first_row : first_row + rows.shape[0]]
            factor = self.factor(moved.norm(dim=1), own)[:, None]
        moved = rows.clone()
        self.inner.add_rows(moved, first_row, 1.0, base)
        rows.lerp_(moved.mul_(factor), strength)
