"""Updates that add to the weight, whatever it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loratool.algebra.updates.base import Product, Update
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class LowRank(Update):
    """ΔW = scale · up @ down, the LoRA update (Hu et al. 2021, arXiv:2106.09685).

    `up` is PEFT's B and `down` its A where the weight is stored (out, in); the other way round,
    each transposed, where it is stored (in, out) or is an embedding table.
    """

    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, columns)
    scale: float
    turnable: bool = field(default=False, compare=False)  # of a linear layer, whose weight may be stored (in, out)
    kernel: tuple[int, ...] = ()  # of a convolution, whose weight is stored (out, in, *kernel)
    table: bool = field(default=False, compare=False)  # of an embedding
    widens: bool = field(default=False, compare=False)  # a smaller weight is padded with zeros to this shape first

    adds_products = True

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.up.shape[0], self.down.shape[1]
        return (rows, columns // math.prod(self.kernel), *self.kernel)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def turned(self) -> LowRank:
        """The same update for the weight stored the other way round."""
        return LowRank(self.down.T, self.up.T, self.scale, self.turnable, table=self.table)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * (self.up.to(weight.dtype) @ self.down.to(weight.dtype))).reshape(weight.shape)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        rows.addmm_(self.up[first_row : first_row + rows.shape[0]], self.down, alpha=self.scale * strength)

    def norm(self) -> float:
        # ‖UD‖² = Σ (UᵀU)∘(DDᵀ): r × r products, the (rows, columns) one is never formed
        up, down = self.up.double(), self.down.double()
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))

    def products(self, columns: int) -> tuple[Product, ...]:  # noqa: ARG002
        return (Product(0, self.up, self.down, self.scale),)


@dataclass(frozen=True)
class Add(Update):
    """ΔW = scale · value: a bias beside lora_B, or a change that is known in full."""

    value: Tensor  # any shape
    scale: float = 1.0

    adds_products = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * self.value.to(weight.dtype)

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:  # noqa: ARG002
        part = self.value.reshape(-1, rows.shape[1])[first_row : first_row + rows.shape[0]]
        rows.add_(part, alpha=self.scale * strength)

    def norm(self) -> float:
        return abs(self.scale) * float(self.value.double().norm())

    def products(self, columns: int) -> tuple[Product, ...]:
        return (Product(0, self.value.reshape(-1, columns), None, self.scale),)


def stack(updates: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Σ strength · update of low-rank updates as one: factors side by side, ranks add up, exact."""
    up = torch.cat([u.up * (u.scale * strength) for u, strength in updates], dim=1)
    return LowRank(up, torch.cat([u.down for u, _ in updates], dim=0), 1.0, kernel=updates[0][0].kernel)
