"""Methods on singular values and vectors, in core space: what they give there is what they give on the whole weight.

Averages go over the rank that is there, never over null directions, whose vectors are rounding. Nor do they go over
directions that hold no more than `noise`, the floor of `loratool.algebra.lowrank.noise`: what cancels leaves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.algebra.lowrank.core import Core
from loratool.algebra.lowrank.joint import Joint, added
from loratool.algebra.lowrank.noise import floor_of
from loratool.algebra.lowrank.products import Decomposition, Product, by_ranks, negligible
from loratool.lazy import Tensor, torch

COMMON_PART = 0.8  # of the rank that Iso-CTS gives to what all have in common
SVC_FLOOR = 0.1  # least part of a direction that Singular Value Calibration believes in
CTM_BALANCE = 0.25  # between norms as they are (1) and equal norms (0)
HOOI_STEPS = 20
HOOI_TOLERANCE = 1e-10


def significant(values: Tensor) -> int:
    """How many singular values, which fall, are more than rounding."""
    return int((values > negligible(values) * values[:1]).sum())


def compact(matrix: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a matrix without its null directions and those of at most `noise`; one where none is left."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(1, min(significant(s), int((s > noise).sum())))
    return u[:, :kept], s[:kept], vt[:kept]


def polar(columns: Tensor, sizes: Tensor, noise: float) -> Tensor:
    """The nearest matrix with orthonormal columns, by SVD; of dependent columns the nearest partial isometry.

    Columns of length 1 are directions of something of these `sizes`: what tells them apart counts where it is more than
    `noise` of that.
    """
    basis = compact(columns * sizes, noise)[0]
    u, _, vt = compact(basis.T @ columns)
    return basis @ (u @ vt)


def above(matrices: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Left basis, (n, R, R') matrices and right basis of what (n, ·, ·) matrices hold above `noise` together."""
    left = compact(matrices.permute(1, 0, 2).flatten(1), noise)[0]
    right = compact(matrices.flatten(0, 1), noise)[2]
    return left, left.T @ matrices @ right.T, right


def tsv(matrices: Tensor, room: int, noise: float = 0.0) -> Tensor:
    """TSV-M (Gargiulo et al. 2024, arXiv:2412.00081): singular vectors of all, orthogonalised, with their own values.

    Each keeps its own rank, or an equal share where the ranks add up to more than there is room for. Matrices that are
    zero, or rounding beside the others, have no directions.
    """
    sizes = torch.linalg.matrix_norm(matrices)
    least = max(noise, negligible(sizes) * float(sizes.amax()))
    parts = [compact(matrix, noise) for matrix in matrices[sizes > least]]
    if not parts:
        return torch.zeros_like(matrices[0])
    if sum(len(s) for _, s, _ in parts) > room:
        share = max(1, room // len(parts))
        parts = [(u[:, :share], s[:share], vt[:share]) for u, s, vt in parts]
    values = torch.cat([s for _, s, _ in parts])
    left = polar(torch.cat([u for u, _, _ in parts], 1), values, noise)
    right = polar(torch.cat([vt for _, _, vt in parts], 0).T, values, noise)
    return (left * values) @ right.T


def iso_c(matrix: Tensor, beta: float, noise: float = 0.0) -> Tensor:
    """Iso-C (Marczak et al. 2025, arXiv:2502.04959): singular values drawn towards their mean, all the way for β = 1."""
    u, s, vt = compact(matrix, noise)
    return (u * ((1 - beta) * s + beta * s.mean())) @ vt


def iso_cts(matrices: Tensor, noise: float) -> Tensor:
    """Iso-CTS (the same paper): what the sum has in common, then what each has besides, all equally strong."""
    u, s, vt = compact(matrices.sum(0), noise)
    count, room = matrices.shape[0], min(matrices.shape[1:])
    own = max(1, round((room - int(room * COMMON_PART)) / count))
    common = min(len(s), max(1, room - own * count))
    u, s, vt = u[:, :common], s[:common], vt[:common]
    lefts, values, rights = [u], [s], [vt]
    for matrix in matrices:
        rest = matrix - u @ (u.T @ matrix)
        if float(rest.norm()) <= max(noise, negligible(rest) ** 0.5 * float(matrix.norm())):
            continue  # nothing but rounding is left of it
        du, ds, dvt = compact(rest, noise)
        lefts, values, rights = [*lefts, du[:, :own]], [*values, ds[:own]], [*rights, dvt[:own]]
    sizes = torch.cat(values)
    merged: Tensor = polar(torch.cat(lefts, 1), sizes, noise) @ polar(torch.cat(rights, 0).T, sizes, noise).T
    return merged * float(sizes.mean())


def svc(
    merged: Decomposition, products: Sequence[Product], weights: Sequence[float], noise: float = 0.0
) -> Decomposition:
    """Singular Value Calibration (arXiv:2602.05536): directions that several share count once, not once for each.

    With aᵣ = uᵣᵀ merged and aᵣⁱ = uᵣᵀ wᵢΔWᵢ, σᵣ is multiplied by n / Σᵢ max(α, ⟨aᵣ, aᵣⁱ⟩ / ‖aᵣⁱ‖²). An update that has
    nothing in a direction takes no part in that direction's mean. A direction of at most `noise` stays as it is.
    """
    u, s, vt = merged.left, merged.values, merged.right
    there, parts = [], []
    for product, weight in zip(products, weights, strict=True):
        own = (u.mT @ product.up) * weight  # uᵣᵀ wᵢ up
        squares = ((own @ (product.down @ product.down.mT)) * own).sum(1)
        common = s * (own * (vt @ product.down.mT)).sum(1)
        own_noise = float(floor_of(product)) * abs(weight)
        there.append(squares > (negligible(s) * squares.amax()).clamp_min(max(own_noise**2, 1e-300)))
        parts.append(common / torch.where(there[-1], squares, 1.0))
    counted = torch.stack(there)
    believed = torch.where(counted, torch.stack(parts).clamp_min(SVC_FLOOR), 0.0).sum(0)
    known = (believed > 0) & (s > noise)
    values = s * torch.where(known, counted.sum(0) / believed.clamp_min(1e-300), 1.0)
    order = values.argsort(descending=True, stable=True)
    return Decomposition(u[:, order], values[order], vt[order])


def pico(shared: Joint, weights: Sequence[float]) -> Joint:
    """Pico (arXiv:2604.16826): the same updates with the output directions that many of them share turned down.

    With U σ Vᵀ = [w₁ΔW₁ … wₙΔWₙ] and pⱼ = σⱼ² / Σσ², each becomes (I + U diag(α − 1) Uᵀ) ΔWᵢ, αⱼ = 1 / (1 + (n − 1) pⱼ).
    ΔWᵢ = upᵢ downᵢ and downᵢᵀ = Qᵢ Cᵢᵀ, so upᵢ Cᵢ has the singular vectors of ΔWᵢ, however its factors share it.
    """
    cores = [torch.linalg.qr(small.down.double().mT, mode="r").R.mT for small in shared.small]
    parts = [w * (small.up.double() @ c) for w, small, c in zip(weights, shared.small, cores, strict=True)]
    stacked = torch.cat(parts, 1)
    if not bool(stacked.any()):
        return shared
    u, s, vt = compact(stacked)
    less = 1 / (1 + (len(weights) - 1) * s.square() / stacked.square().sum()) - 1  # α − 1
    back = zip(weights, shared.products, cores, by_ranks(vt.mT / s, [p.shape[1] for p in parts], 0), strict=True)
    basis = added([w * (p.up @ (c @ turned).to(p.up)) for w, p, c, turned in back])  # U, of the whole weight

    def turned_down(whole: Product, small: Product) -> tuple[Product, Product]:
        change = less[:, None] * (u.mT @ small.up.double())
        up, core = whole.up + basis @ change.to(whole.up), small.up + (u @ change).to(small.up)
        return replace(whole, up=up), replace(small, up=core)

    pairs = [turned_down(whole, small) for whole, small in zip(shared.products, shared.small, strict=True)]
    return Joint(tuple(whole for whole, _ in pairs), tuple(small for _, small in pairs))


def reduced(core: Core, rank: int) -> Core:
    """The same updates in bases of `rank` directions, shared so that each of them keeps a part (CtM, arXiv:2606.03723).

    A Tucker-2 decomposition by HOOI of the updates with their norms drawn together; the result of any method in it
    has that rank by design.
    """
    if rank >= max(core.matrices.shape[1:]):
        return core
    norms = torch.linalg.matrix_norm(core.matrices)
    alive = norms > 0
    target = CTM_BALANCE * norms + (1 - CTM_BALANCE) * norms[alive].mean() if bool(alive.any()) else norms
    even = core.matrices * torch.where(alive, target / norms.clamp_min(1e-300), 0.0)[:, None, None]
    count, rows, columns = even.shape
    width = (min(rank, rows), min(rank, columns))

    def leading(stacked: Tensor, size: int) -> Tensor:
        vectors: Tensor = torch.linalg.svd(stacked, full_matrices=False)[0]
        return vectors[:, :size]

    right = leading(even.permute(2, 0, 1).reshape(columns, count * rows), width[1])
    kept = 0.0
    for _ in range(HOOI_STEPS):
        left = leading((even @ right).permute(1, 0, 2).reshape(rows, -1), width[0])
        right = leading((left.T @ even).permute(2, 0, 1).reshape(columns, -1), width[1])
        now = float((left.T @ even @ right).square().sum())
        if now - kept <= HOOI_TOLERANCE * now:
            break
        kept = now
    return Core(core.left @ left, left.T @ core.matrices @ right, right.T @ core.right)
