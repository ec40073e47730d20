"""LoHa and LoKr as plain LoRA, computed when they are loaded.

(U₁D₁) ∘ (U₂D₂) is the product of all products of a column of U₁ with one of U₂, and of a row of D₁ with one of D₂: a rank of
r₁ · r₂. (U₁D₁) ⊗ (U₂D₂) = (U₁ ⊗ U₂)(D₁ ⊗ D₂), of the same rank; a factor that is stored whole is one with an identity,
and one with a Tucker core has the rank of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Derived, derived
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.products import Hadamard, Kronecker
from loratool.layouts.diffusion.kernels import kernel_of
from loratool.lazy import Tensor, torch
from loratool.notes import Note


def columnwise(one: Tensor, other: Tensor) -> Tensor:
    """All products of a column of the one and a column of the other: (n, a), (n, b) → (n, a·b)."""
    return (one[:, :, None] * other[:, None, :]).reshape(one.shape[0], -1)


def rowwise(one: Tensor, other: Tensor) -> Tensor:
    """The same of rows: (a, n), (b, n) → (a·b, n)."""
    return columnwise(one.mT, other.mT).mT


@dataclass(frozen=True)
class Halves:
    """A matrix as a product; None stands for an identity."""

    up: Any
    down: Any
    rank: int
    kernel: tuple[int, ...] = ()  # where a Tucker core tells it

    @classmethod
    def of(cls, factor: Any) -> Halves:
        if isinstance(factor, Derived):
            if factor.formula is formulas.product:
                up, down = factor.parts
                return cls(up, down, down.shape[0])
            inner = factor.parts[0]
            if isinstance(inner, Derived) and inner.formula is formulas.rebuilt:  # with a Tucker core, as a matrix
                core, left, right = inner.parts
                down = Derived((core.shape[0], factor.shape[1]), (core, right), formulas.along_kernel)
                return cls(left.T, down, core.shape[0], tuple(core.shape[2:]))
        rows, columns = factor.shape
        return cls(None, factor, rows) if rows <= columns else cls(factor, None, columns)


def kronecker(one: Any, other: Any, ranks: tuple[int, int], like: Any) -> Any:
    """The Kronecker product of two matrices, of which None is an identity of its rank, on the device of `like`."""
    sides = [side.shape if side is not None else (rank, rank) for side, rank in zip((one, other), ranks, strict=True)]
    shape = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])

    def formula(*loaded: Tensor) -> Tensor:
        rest, any_of = list(loaded), loaded[0]
        first, second = (
            rest.pop(0) if side is not None else torch.eye(rank, dtype=any_of.dtype, device=any_of.device)
            for side, rank in zip((one, other), ranks, strict=True)
        )
        # torch.kron takes a view, which some strides of transposed factors do not allow
        return (first[:, None, :, None] * second[None, :, None, :]).reshape(shape)

    return derived(shape, formula, *([side for side in (one, other) if side is not None] or [like]))


def kind_unknown(
    updates: Mapping[str, LowRank | ExpertFactors], kernels: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Note, ...]:
    """A note on LoRA made of LoHa and LoKr, by target: on those of which nothing tells whether they are of a convolution.

    `kernels` are those that a base tells.
    """
    flat = sum(
        isinstance(update, LowRank) and not update.kernel and told_kernel(target, kernels or {}) is None
        for target, update in updates.items()
    )
    if not flat:
        return ()
    text = (
        "LoHa and LoKr do not distinguish a convolution from a linear layer unless they have a Tucker core, and the names "
        f"of {flat} layers do not either, so these are written as linear layers. If one is a convolution, no tool can load the result; merge the "
        "adapter instead and run `loratool extract` on the merged model"
    )
    return (Note("layer-kind-unknown", text),)


def as_lora(update: Update) -> LowRank | None:
    """The same ΔW as a product of two factors, computed when they are loaded; None for other kinds of updates."""
    match update:
        case Hadamard(up1=up1, down1=down1, up2=up2, down2=down2):
            rank = down1.shape[0] * down2.shape[0]
            return LowRank(
                derived((up1.shape[0], rank), columnwise, up1, up2),
                derived((rank, down1.shape[1]), rowwise, down1, down2),
                update.scale,
                kernel=update.kernel,
            )
        case Kronecker(left=left, right=right) if len(right.shape) == 2:
            one, other = Halves.of(left), Halves.of(right)
            up = kronecker(one.up, other.up, (one.rank, other.rank), left)
            down = kronecker(one.down, other.down, (one.rank, other.rank), left)
            return LowRank(up, down, update.scale, kernel=update.kernel or other.kernel)
    return None


def told_kernel(target: str, kernels: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The kernel of a target's layer: the one that a base tells, or its name; None where neither does."""
    found = kernels.get(target)
    return kernel_of(target.rpartition(".")[0]) if found is None else found


def as_product(update: Update, target: str, kernels: Mapping[str, tuple[int, ...]] | None = None) -> Update:
    """The same update with LoHa and LoKr as LoRA, within DoRA too; any other as it is.

    Without a Tucker core they are those of a convolution where `kernels`, by target, or the target's name says so.
    """
    plain = as_lora(update.inner if isinstance(update, Magnitude) else update)
    if plain is None:
        return update
    kernel = told_kernel(target, kernels or {})
    if kernel and not plain.kernel and plain.down.shape[1] % math.prod(kernel) == 0:
        plain = replace(plain, kernel=kernel)
    return replace(update, inner=plain) if isinstance(update, Magnitude) else plain
