"""Updates that are products of two factors: LoRA of linear layers, convolutions and embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from loratool.adapters.adapter import Derived
from loratool.adapters.formats.roles.module import Slots
from loratool.adapters.formats.roles.names import DOWN, EMBEDDING, MID, RESHAPE, UP
from loratool.adapters.formats.roles.products import as_matrix
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import LowRank
from loratool.errors import printable

DIMENSIONS = (2, 3, 4, 5)  # of a factor: a matrix, or the kernel of a convolution


def low_rank(slots: Slots) -> LowRank:
    """The product scale · up @ down, of an embedding its transpose."""
    down, up = slots.tensor(DOWN, DIMENSIONS), slots.tensor(UP, DIMENSIONS)
    core = slots.tensor(MID, DIMENSIONS[1:]) if MID in slots else None
    update = product_of(slots, up, down, slots.scale(down.shape[0]), core)
    if slots.module.table or slots.spelled[DOWN] in EMBEDDING:
        matrices = f"{list(up.shape)} and {list(down.shape)}"
        slots.require(not update.kernel, f"its factors are {matrices}; expected two matrices, as it is an embedding")
        return replace(update, turnable=False, table=True).turned
    if RESHAPE in slots:
        shape = slots.shape_in(RESHAPE)
        slots.require(
            shape == update.shape, f"{slots.name(RESHAPE)} says {list(shape)}; its update is {list(update.shape)}"
        )
    return replace(update, widens=True) if RESHAPE in slots or slots.module.widens else update


def product_of(slots: Slots, up: Any, down: Any, scale: float, core: Any = None) -> LowRank:
    """The product scale · up @ down, with the kernel of a convolution; a Tucker core goes into `down`, exactly."""
    kernel, left, right = tuple(down.shape[2:]), as_matrix(up), as_matrix(down)
    if not set(up.shape[2:]) <= {1}:
        slots.fail(f"{shapes_of(up, down)}; expected the first to have a kernel of 1")
    if core is not None:
        if core.shape[:2] != (up.shape[1], down.shape[0]) or not set(kernel) <= {1}:
            slots.fail(f"{shapes_of(up, core, down)}, which do not go together")
        kernel = tuple(core.shape[2:])
        columns = right.shape[1] * math.prod(kernel)
        right = Derived((core.shape[0], columns), (core, right), formulas.along_kernel)
    if left.shape[1] != right.shape[0]:
        slots.fail(f"{shapes_of(up, down)}; their ranks differ")
    return LowRank(left, right, scale, turnable=not kernel, kernel=kernel)


def shapes_of(*factors: Any) -> str:
    """Stored tensors with their shapes, for a message."""
    return " and ".join(f"{printable(each.info.name)} is {list(each.shape)}" for each in factors)
