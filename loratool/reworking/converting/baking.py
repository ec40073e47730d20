"""LoHa and LoKr as plain LoRA, where their rank allows it exactly.

(U₁D₁) ∘ (U₂D₂) is the product of all products of a column of U₁ with one of U₂, and of a row of D₁ with one of D₂: a rank of
r₁ · r₂. (U₁D₁) ⊗ (U₂D₂) = (U₁ ⊗ U₂)(D₁ ⊗ D₂), of the same rank; a factor that is stored whole is one with an identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Adapter, Derived, load_update
from loratool.adapters.layers import layer_of
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.products import Hadamard, Kronecker
from loratool.errors import InputError, LoratoolError, printable
from loratool.lazy import Tensor, torch

BLOCK = 1 << 22  # elements of ΔW that are looked at together
EXACT = 1e-12  # the error that float64 makes of it


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

    @classmethod
    def of(cls, factor: Any) -> Halves:
        if isinstance(factor, Derived) and factor.formula is formulas.product:
            up, down = factor.parts
            return cls(up, down, down.shape[0])
        rows, columns = factor.shape
        return cls(None, factor, rows) if rows <= columns else cls(factor, None, columns)


def kronecker(one: Any, other: Any, one_rank: int, other_rank: int) -> Derived:
    """The Kronecker product of two matrices, of which None is an identity."""
    sides = [side.shape if side is not None else (rank, rank) for side, rank in ((one, one_rank), (other, other_rank))]

    def formula(*loaded: Tensor) -> Tensor:
        like, rest = loaded[0], list(loaded)
        first, second = (
            rest.pop(0) if side is not None else torch.eye(rank, dtype=like.dtype, device=like.device)
            for side, rank in ((one, one_rank), (other, other_rank))
        )
        return torch.kron(first, second)

    shape = (sides[0][0] * sides[1][0], sides[0][1] * sides[1][1])
    parts = tuple(side for side in (one, other) if side is not None)
    return Derived(shape, parts, formula) if parts else identity(one_rank * other_rank)


def identity(size: int) -> Derived:
    return Derived((size, size), (), lambda: torch.eye(size))


def as_lora(update: Update) -> LowRank | None:
    """The same ΔW as a product of two factors, computed when they are loaded; None for other kinds of updates."""
    match update:
        case Hadamard(up1=up1, down1=down1, up2=up2, down2=down2):
            rank = down1.shape[0] * down2.shape[0]
            up: Any = Derived((up1.shape[0], rank), (up1, up2), columnwise)  # type: ignore[arg-type]  # stored tensors
            down: Any = Derived((rank, down1.shape[1]), (down1, down2), rowwise)  # type: ignore[arg-type]
            return LowRank(up, down, update.scale, kernel=update.kernel)
        case Kronecker(left=left, right=right) if len(right.shape) == 2:
            one, other = Halves.of(left), Halves.of(right)
            up = kronecker(one.up, other.up, one.rank, other.rank)
            down = kronecker(one.down, other.down, one.rank, other.rank)
            return LowRank(up, down, update.scale, kernel=update.kernel)
    return None


def baked(adapter: Adapter, shortened: bool) -> tuple[Adapter, dict[str, str]]:
    """The adapter with LoHa and LoKr as LoRA, and what each of these was; `shortened` where ranks are cut later.

    Raises `InputError` where the rank would be so large that factors are no smaller than the matrix.
    """
    updates: dict[str, Update] = dict(adapter.updates)
    kinds: dict[str, str] = {}
    problems: list[str] = []
    for target, update in adapter.updates.items():
        inner = update.inner if isinstance(update, Magnitude) else update
        plain = as_lora(inner)
        if plain is None:
            continue
        kinds[target] = "LoHa" if isinstance(inner, Hadamard) else "LoKr"
        rows, columns = plain.up.shape[0], plain.down.shape[1]
        if not shortened and plain.rank * (rows + columns) >= rows * columns:
            problems.append(
                f"{printable(target)}: {kinds[target]} of {rows} × {columns} is LoRA of rank {plain.rank}, which is no "
                "smaller than the matrix"
            )
        updates[target] = replace(update, inner=plain) if isinstance(update, Magnitude) else plain
    if problems:
        raise InputError("these updates have no small rank; pass --rank or --energy to approximate them:", problems)
    return replace(adapter, updates=updates), kinds


def check_baked(before: Adapter, after: Adapter, target: str) -> None:
    """Raise `LoratoolError` where LoRA that was made of an update is another update; both are worked out, by blocks of rows."""
    one, other = (innermost(adapter.updates[target]) for adapter in (before, after))
    cpu, dtype = torch.device("cpu"), torch.float64
    defined, layer = load_update(one, cpu, dtype), layer_of(target, other)
    assert layer is not None, "it is a product"
    made = layer.load(cpu, dtype)
    rows, columns = made.shape
    size, lost = 0.0, 0.0
    step = max(1, BLOCK // columns)
    for first in range(0, rows, step):
        block = torch.zeros(min(step, rows - first), columns, dtype=dtype)
        defined.add_rows(block, first, 1.0, block)
        size += float(block.square().sum())
        lost += float((block - made.up[first : first + step] @ made.down).square().sum())
    if math.sqrt(lost) > EXACT * math.sqrt(size):
        raise LoratoolError(f"this is a bug in loratool: {printable(target)} as LoRA is another update")


def innermost(update: Update) -> Update:
    return update.inner if isinstance(update, Magnitude) else update
