"""Many updates of one weight at once: what every two of them share, and what a sum cut to a rank would keep of each.

With ΔWᵢ = Uᵢ diag(Sᵢ) Vᵢᵀ, all of it is in the inner products of [U₁ … Uₙ] and of [V₁ … Vₙ], two (R, R) matrices for
ranks that sum to R. The updates themselves are read once and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loratool.algebra.lowrank.noise import is_noise
from loratool.algebra.lowrank.products import Decomposition, Product, by_ranks, decompose, negligible
from loratool.algebra.lowrank.relations import SAMPLES, sampled
from loratool.lazy import Tensor, torch

EXACT = 256  # up to this R: in float64, and the leading directions of a sum among all directions
BLOCK = 128  # rows of a matrix of inner products that are computed at a time
KRYLOV_STEPS = 5
MORE_DIRECTIONS = 8  # than the rank, in each step
MEASURES = (
    "cosine",
    "norm_ratio",
    "overlap_out",
    "random_out",
    "overlap_in",
    "random_in",
    "clash",
    "transfer",
    "interference",
    "sign_conflict",
    "weighted_conflict",
)  # of `relations.Relation`, where each is explained


@dataclass(frozen=True)
class Stack:
    """n updates of one shape, by their singular vectors side by side."""

    shape: tuple[int, int]
    ranks: tuple[int, ...]  # 0 where an update is zero or rounding
    values: Tensor  # (R,): the singular values of all, in float64
    out: Tensor  # (R, R): inner products of the left singular vectors
    into: Tensor  # (R, R): of the right ones
    entries: Tensor  # (n, SAMPLES) of the updates, at the same places of each
    noise: tuple[int, ...]  # updates that are rounding

    def norms(self) -> Tensor:
        """‖ΔWᵢ‖, (n,)."""
        return torch.stack([part.norm() for part in by_ranks(self.values, self.ranks)])

    def products(self) -> Tensor:
        """⟨ΔWᵢ, ΔWⱼ⟩, (n, n)."""
        weighed = self.values[:, None] * self.out.double() * self.into.double() * self.values
        rows = torch.stack([part.sum(0) for part in by_ranks(weighed, self.ranks, 0)])
        return torch.stack([part.sum(1) for part in by_ranks(rows, self.ranks)], 1)


def working_precision(total: int) -> torch.dtype:
    """What to load updates in whose ranks have this sum. Factors stored in float32 are not known better than that."""
    return torch.float64 if total <= EXACT else torch.float32


def stacked(products: Iterable[Product], seed: int = 0) -> Stack:
    """Updates of one shape; nothing is batched. Each is taken, decomposed and dropped."""
    parts: list[Decomposition] = []
    entries: list[Tensor] = []
    noise = []
    shape = (0, 0)
    for at, product in enumerate(products):
        shape = product.shape
        found = decompose(product)
        rounding = bool(is_noise(product, found.values.double().norm()))
        noise += [at] if rounding else []
        parts.append(found.truncated(0 if rounding else found.significant))
        entries.append(sampled(product, seed).to(product.up.dtype).cpu() * (not rounding))
    return Stack(
        shape=shape,
        ranks=tuple(len(part.values) for part in parts),
        values=torch.cat([part.values for part in parts]).double().cpu(),
        out=inner_products([part.left for part in parts]),
        into=inner_products([part.right.mT for part in parts]),
        entries=torch.stack(entries),
        noise=tuple(noise),
    )


def inner_products(parts: Sequence[Tensor]) -> Tensor:
    """[p₁ … pₙ]ᵀ [p₁ … pₙ], of which the half above the diagonal is computed."""
    columns = torch.cat(list(parts), 1)
    found = columns.new_empty(columns.shape[1], columns.shape[1])
    for at in range(0, columns.shape[1], BLOCK):
        rows = columns[:, at : at + BLOCK].mT @ columns[:, at:]
        found[at : at + BLOCK, at:] = rows
        found[at:, at : at + BLOCK] = rows.mT
    return found.cpu()


def measures(stack: Stack) -> dict[str, Tensor]:
    """Each of MEASURES for every two updates, (n, n) in float64; NaN where one of the two is zero."""
    count = len(stack.ranks)
    ranks = torch.tensor(stack.ranks)
    norms, sums = stack.norms(), torch.stack([part.sum() for part in by_ranks(stack.values, stack.ranks)])
    products = stack.products()
    found = {name: torch.full((count, count), math.nan, dtype=torch.float64) for name in MEASURES}
    there = ranks > 0
    both = there[:, None] & there[None, :]
    found["cosine"] = (products / (norms[:, None] * norms)).clamp(-1, 1)
    found["norm_ratio"] = norms / norms[:, None]
    for at in range(count):
        if stack.ranks[at]:
            for name, row in shared_by(stack, at, sums).items():
                found[name][at] = row
            for name, row in opposite(stack.entries, norms, at).items():
                found[name][at, at:] = found[name][at:, at] = row
    for name, table in found.items():
        found[name] = torch.where(both, table, math.nan)
    larger = torch.maximum(ranks[:, None], ranks).double()
    return {**found, "random_out": larger / stack.shape[0], "random_in": larger / stack.shape[1]}


def shared_by(stack: Stack, at: int, sums: Tensor) -> dict[str, Tensor]:
    """What the update number `at` shares with each, (n,)."""
    ranks = torch.tensor(stack.ranks)
    starts = ranks.cumsum(0) - ranks
    owner = torch.repeat_interleave(torch.arange(len(ranks)), ranks)
    place = torch.arange(len(owner)) - starts[owner]
    own = slice(int(starts[at]), int(starts[at] + ranks[at]))

    def blocks(rows: Tensor) -> Tensor:
        """(rank, R) as (n, rank, largest rank), with zeros where a rank is lower."""
        whole = rows.new_zeros(len(ranks), rows.shape[0], int(ranks.max()))
        whole[owner, :, place] = rows.mT
        return whole

    values = stack.values.to(stack.out.dtype)
    first, others = values[own], blocks(values[None, :])  # (rank,), (n, 1, largest rank)
    out, into = blocks(stack.out[own]), blocks(stack.into[own])
    least = ranks.clamp(max=int(ranks[at])).double()
    size = float(stack.values[own].norm())
    upper = (out * others) @ into.mT
    lower = (out * first[:, None]).mT @ into
    # an update is not in its own way: ÛᵀÛ − I has zeros there
    apart = torch.arange(len(ranks)) != at
    clash = upper.abs().sum((1, 2)).double() + lower.abs().sum((1, 2)).double()
    return {
        "overlap_out": out.square().sum((1, 2)).double() / least,
        "overlap_in": into.square().sum((1, 2)).double() / least,
        "clash": (out * first[:, None]).square().sum((1, 2)).double().sqrt() / size,
        "transfer": (into * first[:, None]).square().sum((1, 2)).double().sqrt() / size,
        "interference": apart * clash / (sums + sums[at]),
    }


def opposite(entries: Tensor, norms: Tensor, at: int) -> dict[str, Tensor]:
    """How often sampled entries of the update number `at` and of later ones differ in sign, plainly and by size, (n − at,)."""
    parts = entries[at:] / norms[at:, None].to(entries.dtype)
    against = parts * parts[0] < 0
    smaller = torch.minimum(parts.abs(), parts[0].abs())
    total = smaller.sum(1, dtype=torch.float64)
    weight = (smaller * against).sum(1, dtype=torch.float64) / total
    return {
        "sign_conflict": against.sum(1).double() / SAMPLES,
        "weighted_conflict": torch.where(total > 0, weight, 0.0),
    }


@dataclass(frozen=True)
class Kept:
    """What Σ ΔWᵢ cut to a rank would keep, in float64."""

    of_each: Tensor  # (n,): ‖UᵀΔWᵢV‖², U and V of the result
    of_sum: float  # ‖result‖²
    sum: float  # ‖Σ ΔWᵢ‖²
    interference: float | None  # ‖(ÛᵀÛ − I) diag(S) (V̂ᵀV̂ − I)‖₁ / ΣS of all together; None where all are zero


def kept_at(stack: Stack, rank: int) -> Kept:
    """The best approximation of the sum at a rank, in terms of the singular vectors of its parts.

    A left singular vector of Σ Uᵢ Sᵢ Vᵢᵀ is [U₁ … Uₙ] c, and with G = [U]ᵀ[U], K = diag(S) [V]ᵀ[V] diag(S) it
    has KGc = σ²c. The leading ones are those of a subspace: all of it up to R = EXACT, beyond that a block Krylov space
    (Musco and Musco 2015, arXiv:1504.05477).
    """
    count, total = len(stack.ranks), float(stack.products().sum())
    nothing = torch.zeros(count, dtype=torch.float64)
    if not len(stack.values):
        return Kept(nothing, 0.0, 0.0, None)
    together = interference(stack)
    tiny = negligible(stack.out) * float(stack.values.square().sum())
    squares, left, right = leading(stack, rank, tiny)
    if not len(squares):
        return Kept(nothing, 0.0, max(0.0, total), together)
    parts = zip(*(by_ranks(whole, stack.ranks, 0) for whole in (left, stack.values, right)), strict=True)
    each = [(own.mT * values @ other).square().sum() for own, values, other in parts]
    return Kept(torch.stack(each), float(squares.sum()), total, together)


def leading(stack: Stack, rank: int, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    """σ² of the leading directions of the sum, those above `tiny`, and [U]ᵀ u and [V]ᵀ v of each, (R, ·)."""
    values = stack.values[:, None]
    space = searched(stack, rank)
    seen = (stack.out @ space).double()  # G W
    turned = values * applied(stack.into, values * seen)  # K G W
    sizes, axes = torch.linalg.eigh(space.double().mT @ seen)
    there = sizes > 1e3 * negligible(stack.out) * sizes.max()  # others are one direction stored twice
    white = axes[:, there] * sizes[there].rsqrt()
    squares, vectors = torch.linalg.eigh(white.mT @ (seen.mT @ turned) @ white)
    first = (squares > tiny).nonzero().flatten()[-rank:]
    squares, mix = squares[first], white @ vectors[:, first]
    left = seen @ mix
    return squares, left, applied(stack.into, values * left) / squares.sqrt()


def searched(stack: Stack, rank: int) -> Tensor:
    """Coefficients (R, ·) of a space in which the leading left singular vectors of the sum are looked for."""
    total, width = len(stack.values), rank + MORE_DIRECTIONS
    if total <= max(EXACT, KRYLOV_STEPS * width):
        return torch.eye(total, dtype=stack.out.dtype)
    values = stack.values.to(stack.out.dtype)[:, None]
    block = torch.randn(total, width, dtype=stack.out.dtype, generator=torch.Generator().manual_seed(0))
    blocks = []
    for _ in range(KRYLOV_STEPS):
        block = torch.linalg.qr(values * (stack.into @ (values * (stack.out @ block)))).Q
        blocks.append(block)
    whole: Tensor = torch.linalg.qr(torch.cat(blocks, 1)).Q
    return whole


def applied(matrix: Tensor, to: Tensor) -> Tensor:
    """A product in the precision of the matrix, as float64."""
    found: Tensor = (matrix @ to.to(matrix.dtype)).double()
    return found


def interference(stack: Stack) -> float:
    """TSV's singular task interference of all updates together, as a part of all singular values."""
    out, into = (table - torch.eye(len(stack.values), dtype=table.dtype) for table in (stack.out, stack.into))
    found = (out * stack.values.to(out.dtype)) @ into
    return float(found.abs().sum(dtype=torch.float64)) / float(stack.values.sum())
