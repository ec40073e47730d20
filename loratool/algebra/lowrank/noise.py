"""What rounding leaves where updates cancel, and how small a result must be to be nothing else.

Storing factors rounds them, so that ΔW = Σ upₖ downₖ is known only to a part u of the size of its terms. Where terms
cancel, within one adapter or between several, that error is what remains; dividing by it would turn it into an update
of full size. Whoever divides by the size of an update asks here first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from loratool.algebra.lowrank.joint import Joint
from loratool.algebra.lowrank.products import Product, norm
from loratool.lazy import Tensor

MARGIN = 1.5


def terms(product: Product) -> Tensor:
    """√Σ ‖upₖ‖² ‖downₖ‖² over the rank-one terms of ΔW, in float64; of a batch one number for each."""
    squares = product.up.double().square().sum(-2) * product.down.double().square().sum(-1)
    return squares.sum(-1).sqrt()


def floor_of(product: Product) -> Tensor:
    """1.5 u √Σ ‖upₖ‖² ‖downₖ‖²: an update whose norm is at most this is rounding. Of a batch one number for each."""
    return MARGIN * product.precision * terms(product)


def floor(products: Sequence[Product], weights: Sequence[float]) -> float:
    """1.5 √Σ (uᵢ |wᵢ| ‖ΔWᵢ‖)²: a sum Σ wᵢ ΔWᵢ whose norm is at most this is rounding. Without batches.

    ‖ΔWᵢ‖ stands for the size of its terms where these cancel each other.
    """
    sizes = [max(float(norm(p)), float(terms(p))) for p in products]
    return MARGIN * math.hypot(*(p.precision * w * size for p, w, size in zip(products, weights, sizes, strict=True)))


def is_noise(product: Product, size: Tensor | None = None) -> Tensor:
    """Whether an update is rounding and not zero; of a batch, which of them are. `size` is ‖ΔW‖ where it is known."""
    size = norm(product) if size is None else size
    return (size.to(product.up.device) <= floor_of(product)) & (terms(product) > 0)


def silenced(shared: Joint) -> Joint:
    """The same updates, with zeros for those that are rounding; the others stay the same objects."""
    noise = [is_noise(small) for small in shared.small]

    def silent(products: Sequence[Product]) -> tuple[Product, ...]:
        return tuple(
            dataclasses.replace(p, up=p.up * ~here.to(p.up.device)[..., None, None]) if bool(here.any()) else p
            for p, here in zip(products, noise, strict=True)
        )

    return dataclasses.replace(shared, products=silent(shared.products), small=silent(shared.small))
