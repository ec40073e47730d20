"""PEFT's methods that treat A and B as if they were updates: for parity with `add_weighted_adapter` of PEFT 0.21.

They add cross terms, and they depend on how an adapter shares itself between its factors. Each root of a weight times
its scaling goes on both factors, its sign on A.
"""

from __future__ import annotations

from loratool.algebra.methods.chance import of_each
from loratool.lazy import Tensor, torch


def combine_factors(
    method: str, factors: Tensor, coefficients: Tensor, density: float, by_count: bool, key: str
) -> Tensor:
    """One factor of the result, from the (n, ·, ·) factors of the adapters, unscaled, and the weights of each."""
    kept = factors
    if method.startswith("dare"):
        kept = factors * (of_each(key, 0, factors) < density) / density
    elif method != "linear" and density < 1:
        count = int(density * factors[0].numel())
        masks = torch.zeros_like(factors, dtype=torch.bool).flatten(1)
        top = factors.abs().flatten(1).topk(count).indices
        kept = factors * masks.scatter(1, top, True).reshape(factors.shape)
    weighted = kept * coefficients[:, None, None]
    if not method.endswith("ties"):
        return weighted.sum(0)
    votes = kept.sign().sum(0) if by_count else kept.sum(0)
    agree = kept.sign() == torch.where(votes >= 0, 1.0, -1.0).to(kept.dtype)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)
