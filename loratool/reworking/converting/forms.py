"""Layers in another form that is the same update.

LoHa and LoKr are plain LoRA, where their rank allows it exactly. Layers before and after the attention of a U-Net are linear,
or a convolution of 1 × 1, as their model has them: the numbers are the same, and tools load factors of one form alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapters.adapter import Adapter, load_update
from loratool.adapters.as_lora import as_lora, as_product
from loratool.adapters.layers import Contents, Layer, innermost, kind_of, layer_of
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.products import Hadamard, Kronecker
from loratool.errors import InputError, LoratoolError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.kernels import PROJECTIONS, is_projection
from loratool.lazy import torch

BLOCK = 1 << 18  # elements of ΔW that are looked at together: in float64 they stay in a core's cache
EXACT = 1e-12  # the error that float64 makes of it


def baked(adapter: Adapter, shortened: bool, kernels: Mapping[str, tuple[int, ...]]) -> tuple[Adapter, dict[str, str]]:
    """The adapter with LoHa and LoKr as LoRA, and what each of these was.

    `shortened` where ranks are cut later; `kernels` are those of the layers of a base, by target.

    Raises `InputError` where the rank would be so large that factors are no smaller than the matrix.
    """
    updates: dict[str, Update] = dict(adapter.updates)
    kinds: dict[str, str] = {}
    problems: list[str] = []
    for target, update in adapter.updates.items():
        inner = innermost(update)
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
        updates[target] = as_product(update, target, kernels)
    if problems:
        raise InputError("these updates have no small rank; pass --rank or --energy to approximate them:", problems)
    return replace(adapter, updates=updates), kinds


def kernels_in(adapter: Adapter, base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The kernels of a base's layers whose form an adapter does not tell, by target; nothing of a linear layer.

    They are those that LoHa and LoKr change, and those before and after the attention of a U-Net.
    """
    asked = {
        target: update
        for target, update in adapter.updates.items()
        if isinstance(innermost(update), (Hadamard, Kronecker)) or is_projection(target.rpartition(".")[0])
    }
    if not asked:
        return {}
    from loratool.bases.binding import bind

    places = bind(replace(adapter, updates=asked), base).places
    return {t: base.tensors[every[0].tensor].shape[2:] for t, every in places.items() if len(every) == 1}


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
    room = torch.empty(min(step, rows), columns, dtype=dtype)
    for first in range(0, rows, step):
        block = room[: rows - first].zero_()
        defined.add_rows(block, first, 1.0, block)
        size = math.hypot(size, float(torch.linalg.vector_norm(block)))
        block.addmm_(made.up[first : first + step], made.down, alpha=-1)
        lost = math.hypot(lost, float(torch.linalg.vector_norm(block)))
    if lost > EXACT * size:  # values that are no numbers are refused where they are read
        raise LoratoolError(f"this is a bug in loratool: {printable(target)} as LoRA is another update")


Kernel = tuple[int, ...]


def projections(contents: Contents, kernels: Mapping[str, Kernel], architecture: str) -> dict[str, Kernel]:
    """The kernels of these layers, nothing of a linear one: those that a base tells, else those of an architecture."""
    names = [target for target in contents.layers if is_projection(target.rpartition(".")[0])]
    known = {target: kernels.get(target, PROJECTIONS.get(architecture)) for target in names}
    return {target: kernel for target, kernel in known.items() if kernel is not None}


def in_their_form(contents: Contents, kernels: Mapping[str, Kernel]) -> Contents:
    """The contents with some layers in the form of their kernels; the same where all are."""
    layers = {
        target: in_form(layer, kernels[target])
        for target, layer in contents.layers.items()
        if target in kernels and layer.kernel != kernels[target] and is_one(layer.kernel) and is_one(kernels[target])
    }
    return replace(contents, layers={**contents.layers, **layers}) if layers else contents


def is_one(kernel: Kernel) -> bool:
    return math.prod(kernel) == 1


def in_form(layer: Layer, kernel: Kernel) -> Layer:
    """A layer with another kernel of one element."""
    plain: Any = innermost(layer.update)
    assert isinstance(plain, LowRank), "it has a kernel"
    update = replace(plain, kernel=kernel, turnable=not kernel)
    magnitude = replace(layer.magnitude, inner=update) if isinstance(layer.magnitude, Magnitude) else layer.magnitude
    return replace(layer, kind=kind_of(update), update=update, magnitude=magnitude)
