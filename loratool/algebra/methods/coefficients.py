"""Methods whose result is Σ cᵢ ΔWᵢ: the coefficients, from inner products alone.

`gram` holds ⟨ΔWᵢ, ΔWⱼ⟩, an (n, n) tensor in float64, or (rows, n, n) where each row of the weight has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratool.lazy import Tensor, torch

NEARLY_PARALLEL = 0.9995  # |cosine| from which slerp is linear, as in mergekit
LEAST_ALIKE = 0.2  # mean cosine below which Model Stock means nothing
STRAIGHT_FROM = 1 - 1e-12  # |cosine| from which nuslerp is: nearer, an angle is arithmetic's rounding
NOTHING = 1e-12  # a sum of weights beside their sizes
KARCHER_STEPS = 10
KARCHER_TOLERANCE = 1e-5


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of weights is zero but for the rounding of decimals, as that of 0.1, 0.2 and −0.3 is."""
    return abs(math.fsum(weights)) <= NOTHING * math.fsum(map(abs, weights))


def linear(weights: Tensor, normalize: bool) -> Tensor:
    """cᵢ = wᵢ, or wᵢ / Σw (Wortsman et al. 2022, arXiv:2203.05482; Ilharco et al. 2022, arXiv:2212.04089)."""
    return weights / weights.sum() if normalize and bool(weights.any()) else weights


def slerp(
    gram: Tensor, t: float, nearly_parallel: float = NEARLY_PARALLEL, noise: Tensor | float = 0.0
) -> tuple[Tensor, bool]:
    """Spherical interpolation of two: sin((1 − t)θ)/sin θ and sin(tθ)/sin θ, linear where they are nearly parallel.

    With `gram` (rows, 2, 2) each row has an angle of its own; the result is (..., 2). Where sin θ is at most `noise`,
    the way between the two is rounding, and the result linear; whether that was so of opposites is told as well.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().prod(-1)
    cosine = torch.where(lengths > 0, gram[..., 0, 1] / lengths.clamp_min(1e-300), 1.0).clamp(-1, 1)
    angle = torch.acos(cosine)
    both = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], -1) / torch.sin(angle)[..., None]
    straight = torch.tensor([1 - t, t], dtype=gram.dtype).expand(both.shape)
    unknown = torch.sin(angle) <= noise
    found = torch.where((unknown | (cosine.abs() > nearly_parallel))[..., None], straight, both)
    return found, bool((unknown & (cosine < 0)).any())


def karcher(gram: Tensor, weights: Tensor, noise: float) -> tuple[Tensor, bool]:
    """The mean on the sphere, of length Σ wᵢ‖ΔWᵢ‖ (the Karcher mean of mergekit), found in coefficients.

    Weights are normalised to sum 1. Updates that are zero take no part. Where the directions cancel to an angle of at
    most `noise` there is no mean on the sphere, and the weighted mean takes its place; that this was so is told as well.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    alive = norms > 0
    shares = torch.where(alive, weights, 0.0)
    if not bool(shares.any()):
        return torch.zeros_like(weights), False
    shares = shares / shares.sum()
    inverse = torch.where(alive, 1 / norms.clamp_min(1e-300), 0.0)
    unit = gram * inverse[:, None] * inverse[None, :]  # of the updates at length 1

    def length(coefficients: Tensor) -> float:
        return math.sqrt(max(0.0, float(coefficients @ unit @ coefficients)))

    noise = max(noise, KARCHER_TOLERANCE)
    if length(shares) <= noise:
        return shares, True
    mean = shares / length(shares)
    for _ in range(KARCHER_STEPS):
        cosines = (unit @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        known = (angles > KARCHER_TOLERANCE) & (angles < math.pi - noise)  # no way leads to an opposite
        factors = torch.where(known, angles / torch.sin(angles).clamp_min(1e-12), 0.0) * shares
        step = factors - (factors * cosines).sum() * mean
        size = length(step)
        if size < KARCHER_TOLERANCE:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
        mean = mean / length(mean)
    return mean * inverse * (shares * norms).sum(), False


def mean_cosine(gram: Tensor) -> float:
    """Mean cosine of all pairs; 0 where an update is zero."""
    count = gram.shape[0]
    norms = gram.diagonal().clamp_min(0).sqrt()
    table = gram / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    return float((table.sum() - table.diagonal().sum()) / (count * (count - 1)))


def model_stock(gram: Tensor) -> Tensor:
    """t/n each, with t = n c / (1 + (n − 1) c) of the mean cosine c (Jang et al. 2024, arXiv:2403.19522)."""
    count, cosine = gram.shape[0], mean_cosine(gram)
    ratio = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
    return torch.full((count,), ratio / count, dtype=gram.dtype)
