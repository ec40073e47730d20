"""A sum of products cut to a rank, without orthonormal bases of the whole weight.

With [up₁ … upₙ] = Q L and [down₁; …; downₙ]ᵀ = P R, all that can be asked of Σ cᵢ upᵢ downᵢ is in the small matrices L and
R: Σ cᵢ Lᵢ Rᵢᵀ = u diag(S) vᵀ, and then U S = Σ cᵢ upᵢ (Rᵢᵀ v), so that Q and P, which take most of the time, are not formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.algebra.lowrank.products import Product, WithSingularValues, negligible, signs_of, small_svd
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Joint:
    """Products of one shape, and what they are in coordinates of the bases that they share."""

    products: tuple[Product, ...]
    small: tuple[Product, ...]  # Lᵢ Rᵢᵀ: equal in norms, inner products and angles

    def __getitem__(self, at: int) -> Joint:
        """Of a batch: one of them."""
        return Joint(tuple(p[at] for p in self.products), tuple(p[at] for p in self.small))

    def core(self, coefficients: Sequence[float]) -> Tensor:
        """Σ cᵢ of the products in shared coordinates, in float64: of the same norm."""
        core = sum((c * p.matrix().double() for c, p in zip(coefficients, self.small, strict=True)), start=0.0)
        assert not isinstance(core, float), "there is a product"
        return core

    def sum(self, coefficients: Sequence[float]) -> Spectrum:
        """Σ cᵢ of the products, decomposed."""
        u, s, vt = small_svd(self.core(coefficients))
        return Spectrum(self, tuple(coefficients), u, s, vt)


@dataclass(frozen=True)
class Spectrum(WithSingularValues):
    """The singular values of a sum of products, and its best approximations."""

    joint: Joint
    coefficients: tuple[float, ...]
    u: Tensor  # (..., R, k), in shared coordinates
    values: Tensor  # (..., k)
    vt: Tensor  # (..., k, R)

    def product(self, rank: int) -> Product:
        """The nearest matrix of a rank (Eckart and Young 1936), its singular values shared by both factors.

        The largest entry of each column of `up` is positive. Null directions have zeros.
        """
        u, s, vt = self.u[..., :rank], self.values[..., :rank], self.vt[..., :rank, :]
        there = s > negligible(s) * self.values[..., :1]
        inverse = torch.where(there, s, 1.0).rsqrt() * there  # 1/√S
        ups, downs = [], []
        for c, whole, small in zip(self.coefficients, self.joint.products, self.joint.small, strict=True):
            dtype = whole.up.dtype
            ups.append(whole.up @ ((small.down.double() @ vt.mT) * (c * inverse[..., None, :])).to(dtype))
            downs.append(((u.mT @ small.up.double()) * (c * inverse[..., :, None])).to(dtype) @ whole.down)
        up, down = added(ups), added(downs)
        signs = signs_of(up)
        return Product(up * signs, down * signs.mT)


def added(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], start=parts[0])


def joint(products: Sequence[Product]) -> Joint:
    """Products of one shape, or of one batch, in shared coordinates."""
    left = torch.linalg.qr(torch.cat([p.up for p in products], -1), mode="r").R
    right = torch.linalg.qr(torch.cat([p.down for p in products], -2).mT, mode="r").R
    ranks = [p.rank for p in products]
    pairs = zip(left.split(ranks, -1), right.split(ranks, -1), strict=True)
    small = (Product(one, other.mT, p.rounding) for p, (one, other) in zip(products, pairs, strict=True))
    return Joint(tuple(products), tuple(small))


def truncated(product: Product, rank: int) -> tuple[Product, Tensor]:
    """The nearest product of a rank, and all singular values."""
    found = joint([product]).sum([1.0])
    return found.product(rank), found.values
