"""The singular values of a matrix that is seen some rows at a time, by a randomised sketch.

Halko, Martinsson and Tropp 2011, arXiv:0909.4061, with orthonormalisation at every half step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from loratool.algebra.lowrank.products import Decomposition
from loratool.lazy import Tensor, torch


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


PIECE = 8192  # rows that are worked on at a time
GAIN = 1e-3  # of the error; what is still to come is told to half of it or better


@dataclass(frozen=True)
class Sketch:
    """The leading singular values and vectors of a matrix, and how much there is of it in all."""

    found: Decomposition
    squared: float  # ‖M‖²

    def error(self, rank: int) -> float:
        """‖M − M_k‖ / ‖M‖ of what is found, cut to a rank: what the matrix has, less what the sketch caught of it."""
        kept = float(self.found.values[:rank].double().square().sum())
        return math.sqrt(max(0.0, 1 - kept / self.squared)) if self.squared else 0.0


def sketch(matrix: Rows, rank: int, oversampling: int, iterations: int, seed: int = 0, most: int = 0) -> Sketch:
    """The `rank` leading singular values and vectors, in 2 · `iterations` + 2 passes over the rows.

    Where the spectrum is so flat that more iterations would make the error smaller by over 0.1 %, up to `most` follow.
    Steps are in the dtype of the tiles; the last one, which gives values and error, is in float64.
    """
    rows, columns = matrix.shape
    width = min(rank + oversampling, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float32).to(matrix.device)
    basis = multiply(matrix, start)
    errors: list[float] = []
    for done in itertools.count():
        left = whitened(basis) if done < iterations else whitened(basis.double(), 2)
        small, squared = multiply_transposed(matrix, left)  # (columns, width)
        wide = small.double()
        caught = float(torch.linalg.eigvalsh(wide.T @ wide)[-rank:].sum())
        errors.append(math.sqrt(max(0.0, squared - caught)))
        if done >= iterations and (done >= most or to_come(errors) <= GAIN * errors[-1]):
            break
        basis = multiply(matrix, whitened(small))
    right, core = torch.linalg.qr(small)
    u, s, vt = torch.linalg.svd(core.T)
    return Sketch(Decomposition(left @ u[:, :rank], s[:rank], vt[:rank] @ right.T), squared)


def to_come(errors: Sequence[float]) -> float:
    """How much smaller an error will become, if it goes on becoming smaller by the same ratio."""
    if len(errors) < 3:
        return math.inf
    last, before = errors[-2] - errors[-1], errors[-3] - errors[-2]
    if last <= 0:
        return 0.0
    return last * last / (before - last) if before > last else math.inf


def multiply(matrix: Rows, columns: Tensor) -> Tensor:
    """Matrix @ columns."""
    return torch.cat([tile @ columns.to(tile.dtype) for _, tile in matrix.tiles()])


def multiply_transposed(matrix: Rows, rows: Tensor) -> tuple[Tensor, float]:
    """matrixᵀ @ rows in the wider dtype of the two, and ‖matrix‖² in that dtype."""
    total: Tensor | None = None
    room: Tensor | None = None  # used again: new memory for every tile costs as much as the conversion
    squared = 0.0
    for first, tile in matrix.tiles():
        wide = tile
        if tile.dtype != rows.dtype:
            if room is None or room.shape[0] < tile.shape[0]:
                room = torch.empty(tile.shape, dtype=torch.promote_types(tile.dtype, rows.dtype), device=tile.device)
            wide = room[: tile.shape[0]].copy_(tile)
        part = rows[first : first + tile.shape[0]].to(wide.dtype).T @ wide  # quicker than its transpose
        total = part if total is None else total.add_(part)
        flat = wide.reshape(-1)
        squared += float(flat @ flat)
    assert total is not None, "a matrix without rows has no singular values"
    return total.T, squared


def whitened(columns: Tensor, rounds: int = 1) -> Tensor:
    """Orthonormal columns with the same span, in place of those given; by products, which QR of so few columns is not.

    After Stathopoulos and Wu 2002, https://doi.org/10.1137/S1064827500370883. Directions with less than 1e-7 of the
    largest stay shorter than 1. One round leaves what is far from orthonormal better conditioned; a second is exact.
    """
    for _ in range(rounds):
        gram = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device)
        for piece in torch.split(columns, PIECE):
            wide = piece.double()
            gram.addmm_(wide.T, wide)
        values, vectors = torch.linalg.eigh(gram)
        floor = max(torch.finfo(columns.dtype).tiny ** 2, torch.finfo(torch.float64).tiny)  # of zeros zeros remain
        least = (values[-1] * 1e-14).clamp_min(floor)
        scaled = (vectors * values.clamp_min(least).rsqrt()).to(columns.dtype)
        for piece in torch.split(columns, PIECE):
            piece.copy_(piece @ scaled)
    return columns
