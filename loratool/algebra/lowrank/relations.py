"""How two updates of one weight lie to each other, from their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.algebra.lowrank.products import Decomposition, Product
from loratool.lazy import Tensor, torch

SAMPLES = 2048  # entries of a weight that are looked at for signs


@dataclass(frozen=True)
class Relation:
    """Of one pair; parts are in [0, 1], and None where an update is zero."""

    cosine: float | None
    norm_ratio: float | None  # ‖second‖ / ‖first‖
    overlap_out: float | None  # ‖UᵢᵀUⱼ‖² / min(rank): shared output directions
    overlap_in: float | None  # the same of input directions
    random_out: float  # what two random subspaces of these ranks share
    random_in: float
    angles_out: tuple[float, ...]  # principal angles in degrees, the smallest first
    angles_in: tuple[float, ...]
    clash: float | None  # ‖UⱼUⱼᵀ ΔWᵢ‖ / ‖ΔWᵢ‖: how much of the first's output lies where the second writes
    transfer: float | None  # ‖ΔWᵢ VⱼVⱼᵀ‖ / ‖ΔWᵢ‖: how much the first reacts to what the second reads
    interference: float | None  # ‖(ÛᵀÛ − I) diag(S) (V̂ᵀV̂ − I)‖₁ / ΣS of TSV (Gargiulo et al. 2024, arXiv:2412.00081)
    sign_conflict: float | None  # part of sampled entries with opposite signs
    weighted_conflict: float | None  # the same, entries counting by the smaller of their parts of each norm


def relate(one: Product, other: Product, first: Decomposition, second: Decomposition, seed: int = 0) -> Relation:
    """The relation of two updates of one shape; nothing is batched.

    Their decompositions may be in any coordinates that the two share.
    """
    a, b = (d.truncated(d.significant) for d in (first, second))
    sizes = [float(d.values.double().norm()) for d in (a, b)]
    rows, columns = one.shape
    most = max(len(a.values), len(b.values))
    if not all(sizes):
        return Relation(None, None, None, None, most / rows, most / columns, (), (), None, None, None, None, None)
    out, into = a.left.mT @ b.left, a.right @ b.right.mT
    least = min(len(a.values), len(b.values))
    product = float((a.values[:, None] * out * into * b.values).double().sum()) / (sizes[0] * sizes[1])
    conflict, weighted = signs(one, other, sizes, seed)
    return Relation(
        cosine=max(-1.0, min(1.0, product)),
        norm_ratio=sizes[1] / sizes[0],
        overlap_out=float(out.double().square().sum()) / least,
        overlap_in=float(into.double().square().sum()) / least,
        random_out=most / rows,
        random_in=most / columns,
        angles_out=angles(out),
        angles_in=angles(into),
        clash=float((a.values[:, None] * out).norm()) / sizes[0],
        transfer=float((a.values[:, None] * into).norm()) / sizes[0],
        interference=interference(a, b, out, into),
        sign_conflict=conflict,
        weighted_conflict=weighted,
    )


def angles(between: Tensor) -> tuple[float, ...]:
    """Principal angles of two subspaces, from the inner products of their orthonormal bases (Björck and Golub 1973)."""
    cosines = torch.linalg.svdvals(between.double().cpu()).clamp(0, 1)
    return tuple(math.degrees(math.acos(float(c))) for c in cosines)


def interference(a: Decomposition, b: Decomposition, out: Tensor, into: Tensor) -> float:
    """Singular task interference of the pair, as a part of all singular values; 0 where nothing is shared."""
    # (ÛᵀÛ − I) has only the blocks between the two
    values = torch.cat([a.values, b.values]).double()
    upper = out.double() * b.values.double() @ into.double().mT
    lower = out.double().mT * a.values.double() @ into.double()
    return float(upper.abs().sum() + lower.abs().sum()) / float(values.sum())


def signs(one: Product, other: Product, sizes: list[float], seed: int) -> tuple[float, float]:
    """How often sampled entries have opposite signs, plainly and by size."""
    first, second = sampled(one, seed), sampled(other, seed)
    opposite = first * second < 0
    smaller = torch.minimum(first.abs() / sizes[0], second.abs() / sizes[1])
    total = float(smaller.sum())
    return float(opposite.double().mean()), float(smaller[opposite].sum()) / total if total else 0.0


def sampled(product: Product, seed: int) -> Tensor:
    """SAMPLES entries of an update, (SAMPLES,) in float64, at places that depend on its shape and the seed."""
    rows, columns = product.shape
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(rows, (SAMPLES,), generator=generator).to(product.up.device)
    to = torch.randint(columns, (SAMPLES,), generator=generator).to(product.up.device)
    return (product.up[at].double() * product.down.mT[to].double()).sum(1)
