"""The singular values of a matrix that is seen some rows at a time, by a randomised sketch.

Halko, Martinsson and Tropp 2011, arXiv:0909.4061, with orthonormalisation at every half step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loratool.lowrank.products import Decomposition

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Rows(Protocol):
    """A matrix of which only some rows need be in memory at a time. It may be gone through several times."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def device(self) -> torch.device:
        """Where its tiles come."""

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, (count, columns) tile in float32 or float64) of all rows, in order."""


@dataclass(frozen=True)
class Sketch:
    """The leading singular values and vectors of a matrix, and how much there is of it in all."""

    found: Decomposition
    squared: float  # ‖M‖²

    def error(self, rank: int) -> float:
        """‖M − M_k‖ / ‖M‖ of what is found, cut to a rank: what the matrix has, less what the sketch caught of it."""
        kept = float(self.found.values[:rank].double().square().sum())
        return math.sqrt(max(0.0, 1 - kept / self.squared)) if self.squared else 0.0


def sketch(matrix: Rows, rank: int, oversampling: int, iterations: int, seed: int = 0) -> Sketch:
    """The `rank` leading singular values and vectors, in 2 · `iterations` + 2 passes over the rows.

    Steps are in the dtype of the tiles; the last one, which gives values and error, is in float64.
    """
    import torch

    rows, columns = matrix.shape
    width = min(rank + oversampling, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float32).to(matrix.device)
    basis, squared = multiply(matrix, start)
    for _ in range(iterations):
        basis = multiply(matrix, orthonormal(multiply_transposed(matrix, orthonormal(basis))))[0]
    left = torch.linalg.qr(basis.double()).Q
    small = multiply_transposed(matrix, left)  # (columns, width)
    right, core = torch.linalg.qr(small)
    u, s, vt = torch.linalg.svd(core.T)
    found = Decomposition(left @ u, s, vt @ right.T)
    return Sketch(found.truncated(rank), squared)


def multiply(matrix: Rows, columns: Tensor) -> tuple[Tensor, float]:
    """Matrix @ columns, and ‖matrix‖² on the way."""
    parts: list[Tensor] = []
    squared = 0.0
    for _, tile in matrix.tiles():
        parts.append(tile @ columns.to(tile.dtype))
        squared += float(tile.double().square().sum())
    return joined(parts), squared


def multiply_transposed(matrix: Rows, rows: Tensor) -> Tensor:
    """matrixᵀ @ rows, in the wider dtype of the two."""
    total: Tensor | None = None
    for first, tile in matrix.tiles():
        part = tile.to(rows.dtype).T @ rows[first : first + tile.shape[0]]
        total = part if total is None else total.add_(part)
    assert total is not None, "a matrix without rows has no singular values"
    return total


def orthonormal(columns: Tensor) -> Tensor:
    import torch

    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)
