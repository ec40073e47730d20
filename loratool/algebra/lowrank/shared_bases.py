"""Many products of one shape in a pair of bases that they share: ΔWᵢ ≈ U Mᵢ V, each Mᵢ a small core.

The problem is min Σ ωᵢ ‖ΔWᵢ − U Mᵢ V‖² with orthonormal U and Vᵀ, JD-Full of "Compress then Serve" (arXiv:2407.00066),
which is a Tucker-2 decomposition. The best Mᵢ are (Uᵀ upᵢ)(downᵢ Vᵀ), and what they leave is exactly ‖ΔWᵢ‖² − ‖Mᵢ‖². U and
V come from the leading singular vectors of [√ωᵢ ΔWᵢ] (HOSVD), then alternate (HOOI), all in a frame that is as small as
the ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratool.algebra.lowrank.joint import added, joint
from loratool.algebra.lowrank.products import Product, by_ranks, negligible
from loratool.lazy import Tensor, torch

EXACT = 400  # ranks together up to which the frame is exact
WIDEST = 256  # directions that are looked for where it is not
MARGIN = 8  # directions more than that, which make the others accurate
PASSES = 2  # between the first and the last, each over all products
ROUNDS = 3  # of HOOI


@dataclass(frozen=True)
class Frame:
    """Products in coordinates of bases that hold them, or most of them."""

    small: tuple[Product, ...]  # (R, r) and (r, R'), in float64
    weights: tuple[float, ...]  # ω, 0 for an update that is zero
    left: Callable[[Leading], Tensor]  # directions of the frame as columns of the whole weight
    right: Callable[[Leading], Tensor]  # the same as its rows

    @property
    def most(self) -> int:
        """Directions that the frame has on its smaller side."""
        return min(self.small[0].up.shape[0], self.small[0].down.shape[1])


@dataclass(frozen=True)
class Leading:
    """Leading directions of one side of a frame, and how the factors of the products add up to them."""

    basis: Tensor  # (R, k), orthonormal columns
    mix: tuple[Tensor, ...]  # (r, k) for each product: basis = Σ factorᵢ mixᵢ


@dataclass(frozen=True)
class Shared:
    """Bases, and the products in them."""

    left: Tensor  # U, (rows, R), orthonormal columns
    right: Tensor  # V, (R, columns), orthonormal rows
    cores: tuple[Product, ...]  # Mᵢ, as (R, r) @ (r, R)


def frame(products: Sequence[Product], weights: Sequence[float], widest: int = WIDEST) -> Frame:
    """The frame of products: exact up to a sum of ranks of `EXACT`, else of `widest` directions, found in passes."""
    if sum(p.rank for p in products) <= EXACT:
        shared = joint([p.to(torch.float64) for p in products])

        def left(found: Leading) -> Tensor:  # Q L mix = [up₁ …] mix: Q is never formed
            return added([p.up.double() @ m for p, m in zip(products, found.mix, strict=True)])

        def right(found: Leading) -> Tensor:
            return added([m.mT @ p.down.double() for p, m in zip(products, found.mix, strict=True)])

        return Frame(shared.small, tuple(weights), left, right)
    u, v = streamed(products, weights, widest)
    small = tuple(Product(u.mT @ p.up.double(), p.down.double() @ v) for p in products)
    return Frame(small, tuple(weights), lambda found: u @ found.basis, lambda found: (v @ found.basis).mT)


def streamed(products: Sequence[Product], weights: Sequence[float], widest: int) -> tuple[Tensor, Tensor]:
    """Bases of `widest` directions and a few more, by power iteration.

    Memory beside the factors is (rows + columns) (widest + 8). Two passes in the middle come within 0.6 % of the exact
    solution's loss. Passes are in float32, whose rounding the last one, in float64, leaves behind.
    """
    rows, columns = products[0].shape
    width = min(widest + MARGIN, rows, columns)
    draw = torch.Generator().manual_seed(0)
    device = products[0].up.device

    def start(size: int) -> Tensor:
        drawn = torch.randn(size, width, generator=draw, dtype=torch.float32)
        found: Tensor = torch.linalg.qr(drawn.to(device)).Q
        return found

    u, v = start(rows), start(columns)
    for step in range(PASSES + 1):
        dtype = torch.float64 if step == PASSES else torch.float32
        u, v = one_pass([p.to(dtype) for p in products], weights, u.to(dtype), v.to(dtype), first=not step)
    return u, v


def one_pass(
    products: Sequence[Product], weights: Sequence[float], u: Tensor, v: Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """Orthonormal Σ ω ΔW VᵀV ΔWᵀ U and its like of V; in the first pass Σ ω ΔW ΔWᵀ U, as nothing is known of the other."""
    next_u, next_v = torch.zeros_like(u), torch.zeros_like(v)
    for product, weight in zip(products, weights, strict=True):
        p, t = product.down @ v, product.up.mT @ u  # (r, width)
        middle = (product.down @ product.down.mT, product.up.mT @ product.up) if first else (p @ p.mT, t @ t.mT)
        next_u.addmm_(product.up, middle[0] @ t, alpha=weight)
        next_v.addmm_(product.down.mT, middle[1] @ p, alpha=weight)
    return torch.linalg.qr(next_u).Q, torch.linalg.qr(next_v).Q


def leading(factors: Sequence[Tensor], others: Sequence[Tensor], weights: Sequence[float], rank: int) -> Leading:
    """Leading left singular vectors of [√ωᵢ factorᵢ otherᵢ], (R, r) and (r, R'), none of negligible singular values."""
    turned = [math.sqrt(w) * root(other) for w, other in zip(weights, others, strict=True)]
    stacked = torch.cat([f @ c for f, c in zip(factors, turned, strict=True)], 1)
    u, s, vt = torch.linalg.svd(stacked, full_matrices=False)
    kept = max(1, min(rank, int((s > negligible(s) * s[:1]).sum())))
    back = by_ranks(vt[:kept].mT / s[:kept].clamp_min(1e-300), [c.shape[1] for c in turned], 0)
    return Leading(u[:, :kept], tuple(c @ part for c, part in zip(turned, back, strict=True)))


def root(other: Tensor) -> Tensor:
    """C of at most r columns with C Cᵀ = other otherᵀ, which stands for an (r, R') matrix wherever it is multiplied from the left."""
    found: Tensor = torch.linalg.qr(other.mT, mode="r").R.mT
    return found


def first_bases(within: Frame, rank: int) -> tuple[Leading, Leading]:
    """Directions of both sides by HOSVD."""
    ups, downs = [p.up for p in within.small], [p.down for p in within.small]
    lefts = leading(ups, downs, within.weights, rank)
    return lefts, leading([down.mT for down in downs], [up.mT for up in ups], within.weights, rank)


def energies(within: Frame, most: int) -> list[float]:
    """Σ ωᵢ ‖Mᵢ‖² in bases of 0, 1, … `most` directions a side, those of HOSVD.

    With Xᵢ = Uᵀ upᵢ and Yᵢ = downᵢ Vᵀ, ‖Mᵢ‖² in R directions is ⟨XᵀX, YYᵀ⟩ of the first R rows and columns: cumulated sums.
    """
    lefts, rights = first_bases(within, most)
    count = min(lefts.basis.shape[1], rights.basis.shape[1])
    total = torch.zeros(count, dtype=torch.float64)
    for product, weight in zip(within.small, within.weights, strict=True):
        x = lefts.basis[:, :count].mT @ product.up
        y = (product.down @ rights.basis[:, :count]).mT
        grams = [(side[:, :, None] * side[:, None, :]).cumsum(0) for side in (x, y)]
        total += weight * (grams[0] * grams[1]).sum((1, 2)).cpu()
    return [0.0, *total.tolist()]


def shared_bases(within: Frame, rank: int) -> Shared:
    """The best bases of a number of directions a side that alternating finds from those of HOSVD."""
    ups, downs = [p.up for p in within.small], [p.down for p in within.small]
    lefts, rights = first_bases(within, rank)
    for _ in range(ROUNDS):
        lefts = leading(ups, [down @ rights.basis for down in downs], within.weights, rank)
        rights = leading([d.mT for d in downs], [up.mT @ lefts.basis for up in ups], within.weights, rank)
    cores = tuple(Product(lefts.basis.mT @ up, down @ rights.basis) for up, down in zip(ups, downs, strict=True))
    return Shared(within.left(lefts), within.right(rights), cores)


@dataclass(frozen=True)
class Fitter:
    """Cores with the smallest error in bases that need not be orthonormal, such as rounded ones: by least squares."""

    left: Tensor  # U⁺, (R, rows)
    right: Tensor  # V⁺, (columns, R)

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Fitter:
        """For bases U and V."""
        return cls(inverse(left.double()), inverse(right.double().mT).mT)

    def core(self, product: Product) -> Product:
        """U⁺ ΔW V⁺."""
        return Product(self.left @ product.up.double(), product.down.double() @ self.right)


def inverse(basis: Tensor) -> Tensor:
    """The pseudo-inverse of a tall matrix of full rank."""
    q, r = torch.linalg.qr(basis)
    found: Tensor = torch.linalg.solve_triangular(r, q.mT, upper=True)
    return found
