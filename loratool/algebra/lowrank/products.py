"""up @ down: its singular values, norms and inner products, from QR of the factors.

With up = Qu Ru and downᵀ = Qd Rd, all of up @ down is in the small core Ru Rdᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.algebra.rounding import round_once
from loratool.lazy import Tensor, torch

# Relative error of up @ down by the dtype its factors are stored in: of 16 bits as measured on trained adapters, of
# wider ones with room for factors that were computed, rotated or decomposed in that dtype
ROUNDING = {
    "float8_e5m2": 7.6e-2,
    "float8_e4m3fn": 3.8e-2,
    "bfloat16": 2.4e-3,
    "float16": 3e-4,
    "float32": 1e-6,
    "float64": 1e-12,
}
FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})  # compute capabilities of data-centre GPUs
SMALL_CORE = 512  # up to this size the processor decomposes a core faster than a GPU


@dataclass(frozen=True)
class Product:
    """The matrix up @ down, or a batch of them."""

    up: Tensor  # (..., rows, rank)
    down: Tensor  # (..., rank, columns)
    rounding: float = 0.0  # relative error of the factors as they were stored; 0 where they were computed

    @property
    def precision(self) -> float:
        """The relative error that the update is known with, of storage or of the arithmetic: the larger."""
        return max(self.rounding, ROUNDING[str(self.up.dtype).removeprefix("torch.")])

    @property
    def rank(self) -> int:
        """Columns of `up`, whatever the rank of the matrix is."""
        return self.up.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix."""
        return (self.up.shape[-2], self.down.shape[-1])

    def scaled(self, factor: float) -> Product:
        """`factor` times the matrix. `down` stays as it is: the fewer values change, the fewer are rounded later."""
        return self if factor == 1.0 else replace(self, up=self.up * factor)

    def to(self, dtype: torch.dtype) -> Product:
        """The same in another dtype, each number rounded once."""
        return replace(self, up=round_once(self.up, dtype), down=round_once(self.down, dtype))

    @property
    def is_finite(self) -> bool:
        """Whether every value of both factors is a number."""
        return all_finite(self.up) and all_finite(self.down)

    def matrix(self) -> Tensor:
        """The (..., rows, columns) matrix itself."""
        return self.up @ self.down

    def __getitem__(self, at: int | slice) -> Product:
        """Of a batch: one matrix, or some."""
        return replace(self, up=self.up[at], down=self.down[at])


def all_finite(values: Tensor) -> bool:
    """Whether every value is a number.

    If so is their sum, which takes a tenth of the time. Where that overflows, each value is looked at.
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


class WithSingularValues:
    """What has singular values, the largest first."""

    values: Tensor  # (..., k)

    @property
    def significant(self) -> int:
        """How many singular values are more than rounding: the rank of the matrix (the largest of a batch)."""
        if not self.values.numel():
            return 0
        return int((self.values > negligible(self.values) * self.values[..., :1]).sum(-1).max())


@dataclass(frozen=True)
class Decomposition(WithSingularValues):
    """The compact singular value decomposition U diag(S) Vᵀ of a product; S falls."""

    left: Tensor  # U, (..., rows, k)
    values: Tensor  # S, (..., k)
    right: Tensor  # Vᵀ, (..., k, columns)

    def truncated(self, rank: int) -> Decomposition:
        """The nearest matrix of a rank, in the Frobenius and the spectral norm (Eckart and Young 1936)."""
        return Decomposition(self.left[..., :rank], self.values[..., :rank], self.right[..., :rank, :])

    def product(self) -> Product:
        """As factors that share the singular values, up = U √S and down = √S Vᵀ: the canonical form."""
        root = self.values.sqrt()
        return Product(self.left * root[..., None, :], root[..., :, None] * self.right)


def negligible(values: Tensor) -> float:
    """The part of the largest singular value below which others are rounding: 1e-12 in float64, 1e-6 in float32."""
    return 1e-12 if values.element_size() == 8 else 1e-6


def working_dtype(devices: Sequence[torch.device]) -> torch.dtype:
    """float64, but float32 where one of the GPUs computes in float64 at a small part of its speed."""
    gpus = [device for device in devices if device.type == "cuda"]
    slow = any(torch.cuda.get_device_capability(gpu) not in FAST_FLOAT64 for gpu in gpus)
    return torch.float32 if slow or any(device.type == "mps" for device in devices) else torch.float64


def decompose(product: Product) -> Decomposition:
    """Compact SVD of up @ down in the dtype of the factors, k = min(rank, rows, columns); the core is float64.

    The largest entry of each left singular vector is positive, so that signs do not depend on the library.
    """
    (left, left_core), (right, right_core) = torch.linalg.qr(product.up), torch.linalg.qr(product.down.mT)
    u, s, vt = small_svd(left_core.double() @ right_core.double().mT)
    u, vt = left @ u.to(left.dtype), vt.to(right.dtype) @ right.mT
    signs = signs_of(u)
    return Decomposition(u * signs, s.to(u.dtype), vt * signs.mT)


def signs_of(columns: Tensor) -> Tensor:
    """The signs, (..., 1, k), with which the largest entry of each column is positive."""
    return torch.where(columns.gather(-2, columns.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0).to(columns.dtype)


def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a small matrix or a batch, on its device; the processor is quicker at it than a GPU."""
    small = max(core.shape[-2:]) <= SMALL_CORE
    u, s, vt = torch.linalg.svd(core.cpu() if small else core, full_matrices=False)
    return u.to(core.device), s.to(core.device), vt.to(core.device)


def singular_values(product: Product) -> Tensor:
    """The values of `decompose`, without the vectors."""
    left, right = (torch.linalg.qr(factor, mode="r").R for factor in (product.up, product.down.mT))
    core = left.double() @ right.double().mT
    values: Tensor = torch.linalg.svdvals(core.cpu() if max(core.shape[-2:]) <= SMALL_CORE else core)
    return values


def canonical(product: Product) -> Product:
    """The same matrix by the factors U √S and √S Vᵀ, which do not depend on how `product` shared it.

    (up G, G⁻¹ down) is the same matrix for every invertible G. What looks at entries of factors comes after this.
    """
    found = decompose(product)
    return replace(found.truncated(max(1, found.significant)).product(), rounding=product.rounding)


def inner(one: Product, other: Product) -> Tensor:
    """⟨one, other⟩ = Σ (upᵀ up') ∘ (down down'ᵀ), in float64; one number for each of a batch."""
    left = one.up.double().mT @ other.up.double()
    right = one.down.double() @ other.down.double().mT
    return (left * right).sum((-2, -1))


def gram(products: Sequence[Product]) -> Tensor:
    """The (n, n) inner products of all pairs, in float64, of a batch summed over it."""
    table = torch.zeros(len(products), len(products), dtype=torch.float64)
    for i, one in enumerate(products):
        for j, other in enumerate(products[: i + 1]):
            table[i, j] = table[j, i] = float(inner(one, other).sum())
    return table


def norm(product: Product) -> Tensor:
    """Frobenius norms. By QR: right also where the columns of the factors cancel each other."""
    left = torch.linalg.qr(product.up, mode="r").R
    right = torch.linalg.qr(product.down.mT, mode="r").R
    norms: Tensor = torch.linalg.matrix_norm(left.double() @ right.double().mT)
    return norms


def length(product: Product) -> float:
    """The Frobenius norm, of a batch together."""
    return float(norm(product).square().sum().sqrt())


def length_near(product: Product, sizes: float) -> float:
    """The same by the factors' inner products, several times as fast, where nothing cancels; else by QR.

    `sizes` is ‖up‖ · ‖down‖, of factors in float64. The square is known to some 1e-16 of its square.
    """
    found = math.sqrt(max(0.0, float(inner(product, product).sum())))
    return found if 1e-4 * sizes < found < math.inf else length(product)


def side_by_side(products: Sequence[Product]) -> Product:
    """The sum of products, whose ranks add up: exact."""
    if len(products) == 1:
        return products[0]
    up, down = torch.cat([p.up for p in products], -1), torch.cat([p.down for p in products], -2)
    return Product(up, down, max(p.rounding for p in products))


def difference(one: Product, other: Product) -> Product:
    """One − other. Its `norm` is right where that of a difference of squares has nothing left."""
    return side_by_side([one, replace(other, down=-other.down)])


def change(before: Product, after: Product) -> Product:
    """The product after − before of two whose factors are nearly the same, by the differences of these: exact, however small.

    Its norm may be taken by `inner`, for nothing in it cancels.
    """
    return side_by_side([Product(after.up - before.up, after.down), Product(before.up, after.down - before.down)])


def by_ranks(matrix: Any, ranks: Sequence[int], along: int = -1) -> tuple[Tensor, ...]:
    """The columns (or the rows, `along` 0) of a matrix that belong to each of several products of these `ranks`."""
    return tuple(matrix.split(list(ranks), along))


def padded(product: Product, rank: int) -> Product:
    """The same matrix with zeros up to a rank."""
    missing = rank - product.rank
    if missing <= 0:
        return product
    pad = torch.nn.functional.pad
    return replace(product, up=pad(product.up, (0, missing)), down=pad(product.down, (0, 0, 0, missing)))
