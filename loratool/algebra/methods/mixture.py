"""One weight's updates made one, by any method: a product of the rank that was asked for, and what was lost by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.algebra.lowrank.core import Core, core_space
from loratool.algebra.lowrank.joint import Joint, Spectrum, joint
from loratool.algebra.lowrank.noise import MARGIN, floor, silenced
from loratool.algebra.lowrank.products import (
    Product,
    canonical,
    decompose,
    difference,
    gram,
    norm,
    padded,
    side_by_side,
)
from loratool.algebra.lowrank.sketching import sketch
from loratool.algebra.methods import coefficients, elementwise, factorwise, spectral
from loratool.algebra.methods.elementwise import Merged, Setting
from loratool.algebra.methods.stacks import Formed, Held
from loratool.algebra.methods.table import ELEMENTWISE, FACTORWISE, GRAM, METHODS, PICO, SPECTRAL
from loratool.lazy import Tensor, torch

SKETCH_STEPS = 2
TINY = 1e-150  # the square of less is 0, and a norm says nothing any more
ZERO, UNSCALED = "zero", "unscaled"  # what becomes of a sum that is rounding
SUMS = ("linear", "cat", "svd")
WEIGHTED_SUMS = (*SUMS, "dare_linear", "breadcrumbs", "magnitude_prune")


@dataclass(frozen=True)
class Combination:
    """A method with all its dials set."""

    method: str
    space: str  # of elementwise methods
    setting: Setting
    rank: int | None = None  # of the result; None for what the method gives
    ctm: bool = False  # choose the directions before the method, not after it
    svc: bool = False
    pico: bool = False  # turn down shared directions before the method
    iso_beta: float = 1.0
    row_wise: bool = False
    factor: float = 1.0  # λ
    match: str = "none"  # the norm of the result: none, or the mean, max or sum of those of the weighted updates

    @property
    def name(self) -> str:
        """What `--method` was given."""
        return PICO if self.pico else self.method

    @property
    def divides(self) -> bool:
        """Whether weights are divided by their sum."""
        if self.method in ("slerp", "nuslerp", "karcher"):
            return True
        return self.setting.normalize and self.method in WEIGHTED_SUMS


@dataclass(frozen=True)
class Mixture:
    """The result for one weight."""

    product: Product
    lost: float  # relative error of the cut to its rank
    whole: float  # ‖what the method gives at full rank‖
    cancels: str = ""  # ZERO or UNSCALED where updates cancel and rounding is all that is left


def mix(shared: Joint, weights: Sequence[float], combination: Combination) -> Mixture:
    """Σ w ΔW of one weight, combined so.

    Where the sum is no more than rounding, nothing that depends on its size or its directions is done to it.

    Args:
        shared: ΔW of each adapter that has one, scaling included, without batches.
        weights: of each.
        combination: what to do; its setting's key belongs to this weight.
    """
    share = torch.tensor(list(weights), dtype=torch.float64)
    noise = floor(shared.small, weights)
    left = float(torch.linalg.matrix_norm(shared.core(weights)))
    if noise > TINY and left <= noise:
        return cancelled(shared, share, combination, left)
    if combination.method not in SUMS:
        shared = silenced(shared)
    found = made(spectral.pico(shared, weights) if combination.pico else shared, share, combination, noise)
    factor, told = matching(found.product, shared, share, combination, noise)
    whole = abs(combination.factor * factor) * found.whole
    return Mixture(found.product.scaled(combination.factor * factor), found.lost, whole, found.cancels or told)


def made(shared: Joint, weights: Tensor, combination: Combination, noise: float) -> Mixture:
    """What the method gives, before λ and the norm that is asked for."""
    products = shared.products
    method = METHODS[combination.method]

    def calibrated(product: Product) -> Product:
        if not combination.svc:
            return product
        return spectral.svc(decompose(product), products, weights.tolist(), noise).product()

    if (
        method.family == GRAM
        and combination.rank is not None
        and not (combination.row_wise or combination.svc or combination.ctm)
    ):
        chosen, cancels = of_gram(gram(shared.small), weights, combination, products)
        return replace(cut(shared.sum(chosen.tolist()), combination.rank), cancels=cancels)
    if method.family == ELEMENTWISE and combination.space == "dense":
        found = dense(products, weights, combination)
        return replace(found, product=calibrated(found.product))
    whole, compact, cancels = uncut(products, weights, combination, noise)
    whole, compact = calibrated(whole), compact or combination.svc
    if combination.ctm and combination.rank is not None:
        core = spectral.reduced(core_space(products), combination.rank)
        small = calibrated(in_core(core, combination.rank, products, weights, combination, noise))
        size = float(norm(whole))
        found = cut(spectrum_of(small), combination.rank)
        lost = float(norm(difference(whole, found.product))) / size if size else 0.0
        return Mixture(found.product, lost, size, cancels)
    if combination.rank is not None or compact:
        return replace(cut(spectrum_of(whole), combination.rank), cancels=cancels)
    return Mixture(whole, 0.0, float(norm(whole)), cancels)


def cancelled(shared: Joint, weights: Tensor, combination: Combination, left: float) -> Mixture:
    """The result where Σ w ΔW is rounding of norm `left`: plain sums leave it as it is, other methods a zero.

    It is a zero for all of them where it is the rounding of the arithmetic here.
    """
    arithmetic = floor([replace(small, rounding=0.0) for small in shared.small], weights.tolist())
    if METHODS[combination.method].family != GRAM or combination.method == "model_stock" or left <= arithmetic:
        first = shared.products[0]
        rank = combination.rank or 1
        return Mixture(padded(Product(first.up[:, :rank] * 0.0, first.down[:rank]), rank), 0.0, 0.0, ZERO)
    plain = coefficients.linear(weights, combination.divides)
    if combination.rank is not None:
        found = cut(shared.sum(plain.tolist()), combination.rank)
    else:
        product = side_by_side([p.scaled(float(c)) for p, c in zip(shared.products, plain, strict=True)])
        found = Mixture(product, 0.0, float(norm(product)))
    factor = combination.factor
    return Mixture(found.product.scaled(factor), found.lost, abs(factor) * found.whole, UNSCALED)


def uncut(
    products: Sequence[Product], weights: Tensor, combination: Combination, noise: float
) -> tuple[Product, bool, str]:
    """The result at the rank it has by itself, whether its factors may have null directions, and what cancels."""
    method = METHODS[combination.method]
    if method.family == GRAM:
        whole, cancels = weighted_sum(products, weights, combination)
        return whole, False, cancels
    core = core_space(products)
    if method.family == ELEMENTWISE and combination.space == "knots":
        return knots(core, weights, combination), True, ""
    return in_core(core, min(products[0].shape), products, weights, combination, noise), True, ""


def weighted_sum(products: Sequence[Product], weights: Tensor, combination: Combination) -> tuple[Product, str]:
    """Σ cᵢ ΔWᵢ by factors side by side, and what cancels."""
    if combination.row_wise:
        table = rows_gram(products)
        noise = rows_noise(products, table)
        each, opposite = coefficients.slerp(table, t_of(weights), coefficients.STRAIGHT_FROM, noise)
        parts = [replace(p, up=p.up * each[:, i, None].to(p.up)) for i, p in enumerate(products)]
        return side_by_side(parts), UNSCALED if opposite else ""
    chosen, cancels = of_gram(gram(products), weights, combination, products)
    return side_by_side([p.scaled(float(c)) for p, c in zip(products, chosen, strict=True)]), cancels


def of_gram(
    table: Tensor, weights: Tensor, combination: Combination, products: Sequence[Product]
) -> tuple[Tensor, str]:
    """The coefficients of a method that needs inner products only, and what cancels."""
    angle = MARGIN * math.hypot(*sorted(p.precision for p in products)[-2:])  # of two that are one but for rounding
    opposite = False
    match combination.method:
        case "slerp":
            chosen, opposite = coefficients.slerp(table, t_of(weights), noise=angle)
        case "nuslerp":
            chosen, opposite = coefficients.slerp(table, t_of(weights), coefficients.STRAIGHT_FROM, angle)
        case "karcher":
            chosen, opposite = coefficients.karcher(table, weights, angle)
        case "model_stock":
            chosen = coefficients.model_stock(table)
        case _:
            chosen = coefficients.linear(weights, combination.setting.normalize)
    return chosen, UNSCALED if opposite else ""


def t_of(weights: Tensor) -> float:
    """Where between two adapters: w₂ / (w₁ + w₂)."""
    return float(weights[1] / weights.sum())


def rows_gram(products: Sequence[Product]) -> Tensor:
    """Inner products of the rows of the updates: (rows, n, n)."""
    wide = [(p.up.double(), p.down.double()) for p in products]
    table = torch.zeros(products[0].shape[0], len(wide), len(wide), dtype=torch.float64)
    for i, (up, down) in enumerate(wide):
        for j, (other_up, other_down) in enumerate(wide):
            table[:, i, j] = ((up @ (down @ other_down.mT)) * other_up).sum(1).cpu()
    return table


def rows_noise(products: Sequence[Product], table: Tensor) -> Tensor:
    """The sine of the angle that rounding puts between two rows that are one: 1.5 √Σ (u · terms of the row / ‖row‖)²."""
    squares = torch.zeros(table.shape[0], dtype=torch.float64)
    for i, product in enumerate(products):
        rounded = (product.up.double().square() @ product.down.double().square().sum(1)).cpu() * product.precision**2
        squares += rounded / table[:, i, i].clamp_min(1e-300)
    return MARGIN * squares.sqrt()


def in_core(
    core: Core, room: int, products: Sequence[Product], weights: Tensor, combination: Combination, noise: float
) -> Product:
    """The result of a method in core space; `room` is the largest rank that it may have."""
    share = weights.to(core.matrices)
    if METHODS[combination.method].family == SPECTRAL:
        left, scaled, right = spectral.above(core.matrices * share[:, None, None], noise)
        match combination.method:
            case "tsv":
                merged = spectral.tsv(scaled, room, noise)
            case "iso_c":
                merged = spectral.iso_c(scaled.sum(0), combination.iso_beta, noise)
            case _:
                merged = spectral.iso_cts(scaled, noise)
        return core.product(left @ merged @ right)
    if METHODS[combination.method].family == GRAM:
        chosen, _ = of_gram(gram(products), weights, combination, products)
        return core.product((core.matrices * chosen.to(share)[:, None, None]).sum(0))
    stack = Held(core.matrices)
    rule = elementwise.METHODS[combination.method](stack, share, combination.setting)
    return core.product(Merged(stack, rule).whole())


def knots(core: Core, weights: Tensor, combination: Combination) -> Product:
    """The method on S Vᵢᵀ, with [ΔW₁ … ΔWₙ] = U S [V₁ … Vₙ]ᵀ (KnOTS, Stoica et al. 2024, arXiv:2410.19735)."""
    count, _, columns = core.matrices.shape
    u, s, vt = spectral.compact(core.matrices.permute(1, 0, 2).reshape(core.matrices.shape[1], -1))
    turned = (s[:, None] * vt).reshape(len(s), count, columns).permute(1, 0, 2)
    stack = Held((turned @ core.right).contiguous())  # (n, ·, columns of the weight)
    rule = elementwise.METHODS[combination.method](stack, weights.to(u), combination.setting)
    return Product(core.left @ u, Merged(stack, rule).whole())


def dense(products: Sequence[Product], weights: Tensor, combination: Combination) -> Mixture:
    """The method on the entries of the whole weight, which are formed tile by tile; its leading directions."""
    stack = Formed([canonical(p) for p in products])
    rule = elementwise.METHODS[combination.method](stack, weights.to(products[0].up.device), combination.setting)
    room = min(stack.shape[1:])
    rank = min(combination.rank or sum(p.rank for p in products), room)
    found = sketch(Merged(stack, rule), rank, max(8, rank), SKETCH_STEPS)
    return Mixture(padded(found.found.product(), combination.rank or 0), found.error(rank), math.sqrt(found.squared))


def spectrum_of(product: Product) -> Spectrum:
    return joint([product]).sum([1.0])


def cut(found: Spectrum, rank: int | None) -> Mixture:
    """The nearest product of a rank; without one all of it but its null directions."""
    squares = found.values.double().square()
    total = float(squares.sum())
    kept = max(1, found.significant) if rank is None else rank
    lost = math.sqrt(float(squares[kept:].sum()) / total) if total and rank is not None else 0.0
    return Mixture(padded(found.product(kept), kept), lost, math.sqrt(total))


def matching(
    result: Product, shared: Joint, weights: Tensor, combination: Combination, noise: float
) -> tuple[float, str]:
    """The factor that gives the result the norm that was asked for: 1 where the result is rounding, and that told."""
    if combination.match == "none":
        return 1.0, ""
    sizes = [abs(float(w)) * float(norm(p)) for p, w in zip(shared.small, weights, strict=True)]
    wanted = {"mean": sum(sizes) / len(sizes), "max": max(sizes), "sum": sum(sizes)}[combination.match]
    size = float(norm(result))
    if size > noise:
        return wanted / size, ""
    return 1.0, UNSCALED if size else ""


def mix_factors(
    ups: Sequence[Tensor], downs: Sequence[Tensor], strengths: Sequence[float], combination: Combination
) -> Mixture:
    """PEFT's methods on factors; `ups` and `downs` are unscaled, a strength is a weight times a scaling."""
    assert METHODS[combination.method].family == FACTORWISE
    method = combination.method.removesuffix("-factors")
    strength = torch.tensor(list(strengths), dtype=ups[0].dtype, device=ups[0].device)
    roots = strength.abs().sqrt()
    setting = combination.setting

    def one(side: str, factors: Sequence[Tensor], shares: Tensor) -> Tensor:
        stacked = torch.stack(list(factors))
        return factorwise.combine_factors(
            method, stacked, shares, setting.density, setting.by_count, f"{setting.key}/{side}"
        )

    whole = Product(one("B", ups, roots), one("A", downs, roots * strength.sign()))
    found = cut(spectrum_of(whole), combination.rank) if combination.rank else Mixture(whole, 0.0, float(norm(whole)))
    return Mixture(found.product.scaled(combination.factor), found.lost, abs(combination.factor) * found.whole)
