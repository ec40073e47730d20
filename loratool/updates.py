"""What an adapter does to one weight, as algebra on blocks of its rows.

An update knows no names and no files. A weight of any shape is seen as a matrix: its first
dimension gives the rows, all others together the columns. `delta` is the definition;
`add_rows` is the same change made in place on some of the rows, and the only way the engine
takes. A property test holds the two together for every kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Update(Protocol):
    """A change to one weight. Fields may hold tensors, or their descriptions until they are loaded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this fits."""

    def delta(self, weight: Tensor) -> Tensor:
        """The change to `weight` (of `shape`, float32 or float64), at strength 1, in its dtype."""

    def add_rows(self, rows: Tensor, first_row: int, strength: float) -> None:
        """Change `rows` in place: a (n, columns) block of the weight that begins at row `first_row`."""

    def norm(self) -> float:
        """Frobenius norm of the change at strength 1; infinite where that depends on the weight."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · up @ down, the LoRA update (Hu et al. 2021, arXiv:2106.09685).

    `up` is PEFT's B and `down` its A where the weight is stored (out, in); the other way round,
    each transposed, where it is stored (in, out) or is an embedding table.
    """

    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, columns)
    scale: float
    turnable: bool = False  # the factors of a linear layer, whose weight may be stored (in, out)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def turned(self) -> LowRank:
        """The same update for the weight stored the other way round."""
        return LowRank(self.down.T, self.up.T, self.scale, self.turnable)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.up.to(weight.dtype) @ self.down.to(weight.dtype))

    def add_rows(self, rows: Tensor, first_row: int, strength: float) -> None:
        up = self.up[first_row : first_row + rows.shape[0]]
        rows.addmm_(up, self.down, alpha=self.scale * strength)

    def norm(self) -> float:
        # ‖UD‖² = Σ (UᵀU)∘(DDᵀ): r × r products, the (rows, columns) one is never formed
        up, down = self.up.double(), self.down.double()
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return abs(self.scale) * math.sqrt(max(squared, 0.0))


@dataclass(frozen=True)
class Replace:
    """W becomes `value`, whatever it was: `modules_to_save` of PEFT. Strength does not scale it."""

    value: Tensor  # any shape

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.dtype) - weight

    def add_rows(self, rows: Tensor, first_row: int, strength: float) -> None:  # noqa: ARG002
        rows.copy_(self.value.reshape(-1, rows.shape[1])[first_row : first_row + rows.shape[0]])

    def norm(self) -> float:
        return math.inf


def stack(updates: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Σ strength · update of low-rank updates as one: factors side by side, ranks add up, exact."""
    import torch

    if len(updates) == 1:
        (update, strength), *_ = updates
        return LowRank(update.up, update.down, update.scale * strength)
    up = torch.cat([u.up * (u.scale * strength) for u, strength in updates], dim=1)
    down = torch.cat([u.down for u, _ in updates], dim=0)
    return LowRank(up, down, 1.0)
