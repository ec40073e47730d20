"""Core space: several products of one shape in one pair of orthonormal bases, without loss.

After "Accurate and Efficient Low-Rank Model Merging in Core Space" (arXiv:2509.17786).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.algebra.lowrank.products import Product, canonical, negligible, signs_of
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Core:
    """Product i is left @ matrices[i] @ right."""

    left: Tensor  # (rows, R), orthonormal columns
    matrices: Tensor  # (n, R, R')
    right: Tensor  # (R', columns), orthonormal rows

    def product(self, matrix: Tensor) -> Product:
        """Left @ matrix @ right, by factors of the smaller side."""
        if matrix.shape[0] <= matrix.shape[1]:
            return Product(self.left, matrix @ self.right)
        return Product(self.left @ matrix, self.right)


def core_space(products: Sequence[Product]) -> Core:
    """The core space of products of one shape, without batches.

    The bases are the left singular vectors of [up_1 … up_n] and the right ones of [down_1; …; down_n] in canonical
    form, so that entries of the matrices do not depend on how each product shared itself between its factors.
    """
    parts = [canonical(product) for product in products]
    left = singular_basis(torch.cat([part.up for part in parts], 1))
    right = singular_basis(torch.cat([part.down for part in parts], 0).T).T
    matrices = torch.stack([(left.T @ part.up) @ (part.down @ right.T) for part in parts])
    return Core(left, matrices, right)


def singular_basis(factor: Tensor) -> Tensor:
    """Left singular vectors of a tall matrix, those of negligible singular values left out; signs fixed."""
    q, r = torch.linalg.qr(factor)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    kept = max(1, int((s > negligible(s) * s[:1]).sum()))
    basis: Tensor = q @ u[:, :kept]
    return basis * signs_of(basis)
