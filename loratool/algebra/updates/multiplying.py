"""Updates that multiply the weight, as other updates have left it unless they say otherwise.

At another strength than 1 the result lies on the line from the weight through the result at strength 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loratool.algebra.updates.base import ANY, Update, WeightRows, Wrapped, passed
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

    depends_on_weight = True

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
    depends_on_weight = True

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
    of_matrix: bool = False  # a convolution is multiplied by the transposes: OneTrainer rotates its weight, not inputs

    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        count, size, _ = self.blocks.shape
        return (ANY, ANY if self.shared else count * size)

    @property
    def rank(self) -> int:
        return self.blocks.shape[2]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        if math.prod(shape[1:]) % self.blocks.shape[1] or super().fit(shape) is None:
            return None
        return replace(self, blocks=self.blocks.mT, of_matrix=False) if self.of_matrix and len(shape) > 2 else self

    def delta(self, weight: Tensor) -> Tensor:
        matrix = weight.reshape(weight.shape[0], -1)
        count = matrix.shape[1] // self.blocks.shape[1]
        whole = diagonal(self.blocks.expand(count, -1, -1)).to(weight.dtype)
        return (matrix @ whole).reshape(weight.shape) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        size = self.blocks.shape[1]
        parts = rows.view(rows.shape[0], -1, size).transpose(0, 1)  # (blocks of columns, rows, size)
        rows.lerp_((parts @ self.blocks).transpose(0, 1).reshape(rows.shape), strength)


@dataclass(frozen=True)
class RowRotation(Update):
    """W' = diag(lengths) · Q W of the unmerged W, Q being a product of stages: OFT of the outputs.

    One stage has its blocks on its diagonal (diag-OFT). In a `butterfly` (BOFT, Liu et al. 2023, arXiv:2311.06243) stage
    i, from 0 on, takes rows in groups of size · 2^i, those of the first half of a group in turn with those of the second.
    """

    blocks: Tensor  # (stages, n, size, size), each of which multiplies its rows from the left
    lengths: Tensor | None = None  # (rows,)
    butterfly: bool = False
    weight: WeightRows | None = None  # once prepared

    needs_weight = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[1] * self.blocks.shape[2], ANY)

    @property
    def rank(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[2]

    def prepared(self, weight: WeightRows) -> Update:
        return replace(self, weight=weight)

    def orders(self, rows: int) -> list[Tensor]:
        """For each stage the rows in the order in which its blocks take them."""
        natural = torch.arange(rows, device=self.blocks.device)
        if not self.butterfly:
            return [natural] * self.blocks.shape[0]
        halves = [self.blocks.shape[2] // 2 * 2**stage for stage in range(self.blocks.shape[0])]
        return [natural.view(-1, 2, half).transpose(1, 2).flatten() for half in halves]

    def rows_of(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows of diag(lengths) · Q, (count, rows)."""
        orders, size = self.orders(self.shape[0]), self.blocks.shape[2]
        at = orders[-1].argsort()[first : first + count]  # where the last stage has these rows
        number = at.div(size, rounding_mode="floor")
        turned = torch.zeros(count, *self.blocks.shape[1:3], dtype=dtype, device=self.blocks.device)
        turned[torch.arange(count, device=at.device), number] = self.blocks[-1][number, at % size].to(dtype)
        result = turned.view(count, -1)[:, orders[-1].argsort()]
        for stage, order in reversed([*enumerate(orders[:-1])]):
            parts = result[:, order].view(count, *self.blocks.shape[1:3]).transpose(0, 1)  # (n, count, size)
            reached, turned = parts.flatten(1).any(1), torch.zeros_like(parts)
            turned[reached] = parts[reached] @ self.blocks[stage][reached].to(dtype)
            result = turned.transpose(0, 1).reshape(count, -1)[:, order.argsort()]
        return result if self.lengths is None else result * self.lengths[first : first + count, None].to(dtype)

    def delta(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        for stage, order in enumerate(self.orders(matrix.shape[0])):
            blocks = self.blocks[stage].to(weight.dtype)
            turned = (blocks @ matrix[order].view(*blocks.shape[:2], -1)).flatten(0, 1)
            matrix = torch.empty_like(turned).index_copy_(0, order, turned)
        if self.lengths is not None:
            matrix = matrix * self.lengths[:, None].to(weight.dtype)
        return matrix.reshape(weight.shape) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        assert self.weight is not None, "prepare the update first"
        factors = self.rows_of(first_row, rows.shape[0], rows.dtype)
        used = factors.any(0).nonzero()
        change = -base
        if used.numel():
            start, stop = int(used[0]), int(used[-1]) + 1
            for first, block in self.weight(start, stop - start):
                change = change.addmm(factors[:, first : first + block.shape[0]], block.to(rows.dtype))
        rows.add_(change, alpha=strength)


@dataclass(frozen=True)
class InputMap(Update):
    """ΔW = scale · W @ left @ right of the unmerged W: the part of GLoRA (Chavan et al. 2023, arXiv:2306.07967) that
    changes what a layer is given. A column of a convolution is an input channel.
    """

    left: Tensor  # (columns, rank)
    right: Tensor  # (rank, columns)
    scale: float
    repeat: int = 1  # columns of the matrix for one of `left`, once fitted

    looks_at_base = True
    depends_on_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (ANY, self.left.shape[0])

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        fits = len(shape) > 1 and shape[1] == self.left.shape[0]
        return replace(self, repeat=math.prod(shape[2:])) if fits else None

    def delta(self, weight: Tensor) -> Tensor:
        seen = weight.reshape(*weight.shape[:2], -1)
        change = torch.einsum("oik,ij->ojk", seen, self.left.to(weight.dtype) @ self.right.to(weight.dtype))
        return (self.scale * change).reshape(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        seen = base.view(base.shape[0], -1, self.repeat).transpose(1, 2)  # (rows, repeat, columns)
        change = (seen @ self.left @ self.right).transpose(1, 2).reshape(rows.shape)
        rows.add_(change, alpha=self.scale * strength)


@dataclass(frozen=True)
class Reflections(Update):
    """W' = W @ Π (I − 2uuᵀ), u being the columns of `units`: HRA (Yuan et al. 2024, arXiv:2405.17484)."""

    units: Tensor  # (columns, r), of length 1

    depends_on_weight = True

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

    depends_on_weight = True

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
        return (seen @ blocks[:, None] + blocks[:, None]).transpose(1, 2).reshape(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        size = self.blocks.shape[1]
        for number, within, own in passed(first_row, rows.shape[0], size):
            block, part = self.blocks[number], rows[own]
            parted = part.view(len(part), -1, size)
            parted.add_(parted @ block + block[within : within + len(part), None, :], alpha=strength)
