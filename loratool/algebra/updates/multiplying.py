"""Updates that multiply the weight, as other updates have left it unless they say otherwise.

At another strength than 1 the result lies on the line from the weight through the result at strength 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.base import ANY, Update, Wrapped
from loratool.algebra.updates.formulas import diagonal
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Scale(Update):
    """Each row of W, or with `by_column` each column, times its factor: (IA)³ (Liu et al. 2022, arXiv:2205.05638).

    A column of a convolution is an input channel. A bias is scaled element by element.
    """

    factors: Tensor  # (rows,) or (columns,)
    by_column: bool = False
    dimensions: int = 2  # of the weight
    repeat: int = 1  # columns of the matrix for one factor, once fitted
    turnable: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.factors.shape[0]
        sizes = [ANY] * self.dimensions
        sizes[1 if self.by_column else 0] = size
        return tuple(sizes)

    @property
    def turned(self) -> Scale:
        return replace(self, by_column=not self.by_column)

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        return replace(self, repeat=math.prod(shape[2:])) if super().fit(shape) else None

    def delta(self, weight: Tensor) -> Tensor:
        factors = self.factors.to(weight.dtype)
        if self.by_column:
            return weight * (factors.reshape(1, -1, *[1] * (weight.dim() - 2)) - 1)
        return weight * (factors.reshape(-1, *[1] * (weight.dim() - 1)) - 1)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        if self.by_column:
            factors = self.factors.repeat_interleave(self.repeat)[None, :]
        else:
            factors = self.factors[first_row : first_row + rows.shape[0], None]
        rows.lerp_(rows * factors, strength)


@dataclass(frozen=True)
class Modulated(Wrapped):
    """ΔW = W ⊙ P, W being the unmerged weight and P the change by `inner`, which only adds: HiRA (Huang et al., ICLR 2025)."""

    looks_at_base = True

    @property
    def turned(self) -> Modulated:
        return Modulated(self.inner.turned)

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        inner = self.inner.fit(shape)
        return Modulated(inner) if inner else None

    def delta(self, weight: Tensor) -> Tensor:
        return weight * self.inner.delta(weight)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        factors = torch.zeros_like(rows)
        self.inner.add_rows(factors, first_row, 1.0, base)
        rows.addcmul_(base, factors, value=strength)


@dataclass(frozen=True)
class Rotation(Update):
    """W' = W @ blockdiag(blocks): OFT (Qiu et al. 2023, arXiv:2306.07280)."""

    blocks: Tensor  # (n, size, size)
    shared: bool = False  # one block serves for all

    @property
    def shape(self) -> tuple[int, ...]:
        count, size, _ = self.blocks.shape
        return (ANY, ANY if self.shared else count * size)

    @property
    def rank(self) -> int:
        return self.blocks.shape[2]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        return super().fit(shape) if math.prod(shape[1:]) % self.blocks.shape[1] == 0 else None

    def delta(self, weight: Tensor) -> Tensor:
        matrix = weight.reshape(weight.shape[0], -1)
        count = matrix.shape[1] // self.blocks.shape[1]
        whole = diagonal(self.blocks.expand(count, -1, -1)).to(weight.dtype)
        return (matrix @ whole).reshape(weight.shape) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        size = self.blocks.shape[1]
        parts = rows.view(rows.shape[0], -1, size).transpose(0, 1)  # (blocks of columns, rows, size)
        turned = parts @ self.blocks
        rows.lerp_(turned.transpose(0, 1).reshape(rows.shape), strength)


@dataclass(frozen=True)
class Reflections(Update):
    """W' = W @ Π (I − 2uuᵀ), u being the columns of `units`: HRA (Yuan et al. 2024, arXiv:2405.17484)."""

    units: Tensor  # (columns, r), of length 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, self.units.shape[0])

    @property
    def rank(self) -> int:
        return self.units.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        matrix = weight.reshape(weight.shape[0], -1)
        product = torch.eye(matrix.shape[1], dtype=weight.dtype)
        for unit in self.units.to(weight.dtype).T:
            product = product @ (torch.eye(matrix.shape[1], dtype=weight.dtype) - 2 * torch.outer(unit, unit))
        return (matrix @ product).reshape(weight.shape) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        reflected = rows.clone()
        for unit in self.units.T:
            reflected.addr_(reflected @ unit, unit, alpha=-2)
        rows.lerp_(reflected, strength)


@dataclass(frozen=True)
class BlockAffine(Update):
    """Every square block of W, in block row n, becomes itself @ (I + blocks[n]) + blocks[n]: MiSS in its `bat` form."""

    blocks: Tensor  # (rows / size, size, size)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[0] * self.blocks.shape[1], ANY)

    @property
    def rank(self) -> int:
        return self.blocks.shape[1]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        return super().fit(shape) if math.prod(shape[1:]) % self.blocks.shape[1] == 0 else None

    def delta(self, weight: Tensor) -> Tensor:
        count, size, _ = self.blocks.shape
        blocks = self.blocks.to(weight.dtype)
        seen = weight.reshape(count, size, -1, size).transpose(1, 2)  # (n, m, size, size)
        changed = seen @ blocks[:, None] + blocks[:, None]
        return changed.transpose(1, 2).reshape(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        size, at = self.blocks.shape[1], 0
        while at < rows.shape[0]:
            number, within = divmod(first_row + at, size)
            count = min(size - within, rows.shape[0] - at)
            block = self.blocks[number]
            part = rows[at : at + count].view(count, -1, size)
            part.add_(part @ block + block[within : within + count, None, :], alpha=strength)
            at += count
