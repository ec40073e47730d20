"""Weight-decomposed updates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.algebra.updates.base import Update, WeightRows, Wrapped
from loratool.lazy import Tensor


@dataclass(frozen=True)
class Magnitude(Wrapped):
    """W' = m/‖W + ΔW‖ ⊙ (W + ΔW): DoRA (Liu et al. 2024, arXiv:2402.09353), by composition.

    The norm is that of each row, or of each column (`by_column`) where the weight is stored (in, out) or is an
    embedding table. It is taken with the unmerged weight, also where other updates came before. A row or column
    of norm 0 stays 0. At another strength W' lies on the line from W through the result at strength 1.
    """

    magnitude: Tensor  # (rows,), or (columns,) by column
    by_column: bool = False
    norms: Tensor | None = None  # (columns,) of W + ΔW, once prepared

    looks_at_base = True

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
        return replace(self, inner=inner)

    def prepared(self, weight: WeightRows) -> Update:
        inner = self.inner.prepared(weight) if self.inner.needs_weight else self.inner
        if not self.by_column:
            return replace(self, inner=inner)
        squared: Tensor | None = None
        for first_row, base in weight():
            moved = base.clone()
            inner.add_rows(moved, first_row, 1.0, base)
            here = moved.double().square().sum(0)
            squared = here if squared is None else squared + here
        assert squared is not None, "a weight without rows has no update"
        return replace(self, inner=inner, norms=squared.sqrt())

    def factor(self, norms: Tensor, magnitude: Tensor) -> Tensor:
        return (magnitude.to(norms.dtype) / norms).masked_fill(norms == 0, 0.0)

    def delta(self, weight: Tensor) -> Tensor:
        moved = (weight + self.inner.delta(weight)).reshape(weight.shape[0], -1)
        if self.by_column:
            moved = moved * self.factor(moved.norm(dim=0), self.magnitude)
        else:
            moved = moved * self.factor(moved.norm(dim=1), self.magnitude)[:, None]
        return moved.reshape(weight.shape) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        if self.by_column:
            assert self.norms is not None, "prepare the update first"
            factor = self.factor(self.norms, self.magnitude).to(rows.dtype)
        else:
            moved = base.clone()
            self.inner.add_rows(moved, first_row, 1.0, base)
            own = self.magnitude[first_row : first_row + rows.shape[0]]
            factor = self.factor(moved.norm(dim=1), own)[:, None]
        moved = rows.clone()
        self.inner.add_rows(moved, first_row, 1.0, base)
        rows.lerp_(moved.mul_(factor), strength)
