"""One weight's updates made one, by any method: a product of the rank that was asked for, and what was lost by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.lowrank import (
    Core,
    Joint,
    Product,
    Spectrum,
    canonical,
    core_space,
    decompose,
    difference,
    gram,
    inner,
    joint,
    norm,
    padded,
    side_by_side,
    sketch,
)
from loratool.lowrank.products import negligible
from loratool.methods import coefficients, elementwise, factorwise, spectral
from loratool.methods.elementwise import Merged, Setting
from loratool.methods.stacks import Formed, Held
from loratool.methods.table import ELEMENTWISE, FACTORWISE, GRAM, METHODS

if TYPE_CHECKING:
    from torch import Tensor

SKETCH_STEPS = 2
TINY = 1e-150  # the square of less is 0, and a norm says nothing any more
WEIGHTED_SUMS = ("linear", "cat", "svd", "dare_linear", "breadcrumbs", "magnitude_prune")


@dataclass(frozen=True)
class Recipe:
    """A method with all its dials set."""

    method: str
    space: str  # of elementwise methods
    setting: Setting
    rank: int | None = None  # of the result; None for what the method gives
    ctm: bool = False  # choose the directions before the method, not after it
    svc: bool = False
    iso_beta: float = 1.0
    row_wise: bool = False
    factor: float = 1.0  # λ
    match: str = "none"  # the norm of the result: none, or the mean, max or sum of those of the weighted updates

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


def mix(shared: Joint, weights: Sequence[float], recipe: Recipe) -> Mixture:
    """Σ w ΔW of one weight as the recipe means it.

    Args:
        shared: ΔW of each adapter that has one, scaling included, without batches.
        weights: of each.
        recipe: what to do; its setting's key belongs to this weight.
    """
    import torch

    products, share = shared.products, torch.tensor(list(weights), dtype=torch.float64)
    method = METHODS[recipe.method]
    if method.family == GRAM and recipe.rank is not None and not (recipe.row_wise or recipe.svc or recipe.ctm):
        chosen = of_gram(gram(shared.small), share, recipe)
        found = cut(shared.sum(chosen.tolist()), recipe.rank)
    elif method.family == ELEMENTWISE and recipe.space == "dense":
        found = dense(products, share, recipe)
        if recipe.svc:
            calibrated = spectral.svc(decompose(found.product), products, weights).product()
            found = Mixture(calibrated, found.lost, found.whole)
    else:
        whole, compact = uncut(products, share, recipe)
        if recipe.svc:
            whole, compact = spectral.svc(decompose(whole), products, weights).product(), True
        if recipe.ctm and recipe.rank is not None:
            small = in_core(spectral.reduced(core_space(products), recipe.rank), recipe.rank, products, share, recipe)
            if recipe.svc:
                small = spectral.svc(decompose(small), products, weights).product()
            size = float(norm(whole))
            found = cut(spectrum_of(small), recipe.rank)
            found = Mixture(found.product, float(norm(difference(whole, found.product))) / size if size else 0.0, size)
        elif recipe.rank is not None or compact:
            found = cut(spectrum_of(whole), recipe.rank)
        else:
            found = Mixture(whole, 0.0, float(norm(whole)))
    if cancels(found, shared, weights, recipe):
        return Mixture(found.product.scaled(0.0), 0.0, 0.0)
    factor = recipe.factor * matching(found.product, products, share, recipe)
    return Mixture(found.product.scaled(factor), found.lost, abs(factor) * found.whole)


def uncut(products: Sequence[Product], weights: Tensor, recipe: Recipe) -> tuple[Product, bool]:
    """The result at the rank it has by itself, and whether there may be null directions in its factors."""
    method = METHODS[recipe.method]
    if method.family == GRAM:
        return weighted_sum(products, weights, recipe), False
    core = core_space(products)
    if method.family == ELEMENTWISE and recipe.space == "knots":
        return knots(core, weights, recipe), True
    return in_core(core, min(products[0].shape), products, weights, recipe), True


def weighted_sum(products: Sequence[Product], weights: Tensor, recipe: Recipe) -> Product:
    """Σ cᵢ ΔWᵢ by factors side by side."""
    if recipe.row_wise:
        left = [p.up.double() for p in products]
        table = rows_gram(products, left)
        each = coefficients.slerp(table, t_of(weights), 1 - 1e-12)
        parts = [Product(p.up * each[:, i, None].to(p.up), p.down) for i, p in enumerate(products)]
    else:
        parts = [p.scaled(float(c)) for p, c in zip(products, of_gram(gram(products), weights, recipe), strict=True)]
    return side_by_side(parts)


def of_gram(table: Tensor, weights: Tensor, recipe: Recipe) -> Tensor:
    """The coefficients of a method that needs inner products only."""
    match recipe.method:
        case "slerp":
            return coefficients.slerp(table, t_of(weights))
        case "nuslerp":
            return coefficients.slerp(table, t_of(weights), 1 - 1e-12)
        case "karcher":
            return coefficients.karcher(table, weights)
        case "model_stock":
            return coefficients.model_stock(table)
    return coefficients.linear(weights, recipe.setting.normalize)


def t_of(weights: Tensor) -> float:
    """Where between two adapters: w₂ / (w₁ + w₂)."""
    return float(weights[1] / weights.sum())


def rows_gram(products: Sequence[Product], ups: Sequence[Tensor]) -> Tensor:
    """Inner products of the rows of the updates: (rows, n, n)."""
    import torch

    count = len(products)
    table = torch.zeros(products[0].shape[0], count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            between = products[i].down.double() @ products[j].down.double().mT
            table[:, i, j] = ((ups[i] @ between) * ups[j]).sum(1).cpu()
    return table


def in_core(core: Core, room: int, products: Sequence[Product], weights: Tensor, recipe: Recipe) -> Product:
    """The result of a method in core space; `room` is the largest rank that it may have."""
    share = weights.to(core.matrices)
    scaled = core.matrices * share[:, None, None]
    match recipe.method:
        case "tsv":
            return core.product(spectral.tsv(scaled, room))
        case "iso_c":
            return core.product(spectral.iso_c(scaled.sum(0), recipe.iso_beta))
        case "iso_cts":
            return core.product(spectral.iso_cts(scaled))
    if METHODS[recipe.method].family == GRAM:
        chosen = of_gram(gram(products), weights, recipe)
        return core.product((core.matrices * chosen.to(share)[:, None, None]).sum(0))
    stack = Held(core.matrices)
    rule = elementwise.METHODS[recipe.method](stack, share, recipe.setting)
    return core.product(Merged(stack, rule).whole())


def knots(core: Core, weights: Tensor, recipe: Recipe) -> Product:
    """The method on S Vᵢᵀ, with [ΔW₁ … ΔWₙ] = U S [V₁ … Vₙ]ᵀ (KnOTS, Stoica et al. 2024, arXiv:2410.19735)."""
    count, _, columns = core.matrices.shape
    u, s, vt = spectral.compact(core.matrices.permute(1, 0, 2).reshape(core.matrices.shape[1], -1))
    turned = (s[:, None] * vt).reshape(len(s), count, columns).permute(1, 0, 2)
    stack = Held((turned @ core.right).contiguous())  # (n, ·, columns of the weight)
    rule = elementwise.METHODS[recipe.method](stack, weights.to(u), recipe.setting)
    return Product(core.left @ u, Merged(stack, rule).whole())


def dense(products: Sequence[Product], weights: Tensor, recipe: Recipe) -> Mixture:
    """The method on the entries of the whole weight, which are formed tile by tile; its leading directions."""
    stack = Formed([canonical(p) for p in products])
    rule = elementwise.METHODS[recipe.method](stack, weights.to(products[0].up.device), recipe.setting)
    room = min(stack.shape[1:])
    rank = min(recipe.rank or sum(p.rank for p in products), room)
    found = sketch(Merged(stack, rule), rank, max(8, rank), SKETCH_STEPS)
    return Mixture(padded(found.found.product(), recipe.rank or 0), found.error(rank), math.sqrt(found.squared))


def spectrum_of(product: Product) -> Spectrum:
    return joint([product]).sum([1.0])


def cut(found: Spectrum, rank: int | None) -> Mixture:
    """The nearest product of a rank; without one all of it but its null directions."""
    squares = found.values.double().square()
    total = float(squares.sum())
    kept = max(1, found.significant) if rank is None else rank
    lost = math.sqrt(float(squares[kept:].sum()) / total) if total and rank is not None else 0.0
    return Mixture(padded(found.product(kept), kept), lost, math.sqrt(total))


def cancels(found: Mixture, shared: Joint, weights: Sequence[float], recipe: Recipe) -> bool:
    """Whether a sum has nothing left but rounding, which would be told as if it were an update."""
    if METHODS[recipe.method].family == ELEMENTWISE or recipe.divides or recipe.method == "model_stock":
        return False
    sizes = [abs(w) * math.sqrt(max(0.0, float(inner(p, p)))) for p, w in zip(shared.small, weights, strict=True)]
    return max(sizes) > TINY and found.whole <= negligible(found.product.up) * max(sizes)


def matching(result: Product, products: Sequence[Product], weights: Tensor, recipe: Recipe) -> float:
    """The factor that gives the result the norm that was asked for."""
    if recipe.match == "none":
        return 1.0
    sizes = [abs(float(w)) * math.sqrt(max(0.0, float(inner(p, p)))) for p, w in zip(products, weights, strict=True)]
    wanted = {"mean": sum(sizes) / len(sizes), "max": max(sizes), "sum": sum(sizes)}[recipe.match]
    size = float(norm(result))
    return wanted / size if size > negligible(result.up) * max(sizes) else 1.0  # updates that cancel leave rounding


def mix_factors(ups: Sequence[Tensor], downs: Sequence[Tensor], strengths: Sequence[float], recipe: Recipe) -> Mixture:
    """PEFT's methods on factors; `ups` and `downs` are unscaled, a strength is a weight times a scaling."""
    import torch

    assert METHODS[recipe.method].family == FACTORWISE
    method = recipe.method.removesuffix("-factors")
    strength = torch.tensor(list(strengths), dtype=ups[0].dtype, device=ups[0].device)
    roots = strength.abs().sqrt()
    setting = recipe.setting

    def one(side: str, factors: Sequence[Tensor], shares: Tensor) -> Tensor:
        stacked = torch.stack(list(factors))
        return factorwise.combine_factors(
            method, stacked, shares, setting.density, setting.by_count, f"{setting.key}/{side}"
        )

    whole = Product(one("B", ups, roots), one("A", downs, roots * strength.sign()))
    found = cut(spectrum_of(whole), recipe.rank) if recipe.rank else Mixture(whole, 0.0, float(norm(whole)))
    return Mixture(found.product.scaled(recipe.factor), found.lost, abs(recipe.factor) * found.whole)
