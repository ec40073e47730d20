"""Updates that are products of two factors: LoRA of linear layers, convolutions and embeddings."""

from __future__ import annotations

import math
from typing import Any

from loratool.adapters.adapter import Derived
from loratool.adapters.formats.roles.module import Slots
from loratool.adapters.formats.roles.names import DOWN, EMBEDDING, MID, UP
from loratool.algebra.updates import formulas
from loratool.algebra.updates.additive import LowRank

DIMENSIONS = (2, 3, 4, 5)  # of a factor: a matrix, or the kernel of a convolution


def low_rank(slots: Slots) -> LowRank:
    """The product scale · up @ down, with the kernel of a convolution; a Tucker core (`lora_mid`) goes into `down`, exactly."""
    down, up = slots.tensor(DOWN, DIMENSIONS), slots.tensor(UP, DIMENSIONS)
    shapes = f"{slots.name(UP)} is {list(up.shape)} and {slots.name(DOWN)} is {list(down.shape)}"
    slots.require(set(up.shape[2:]) <= {1}, f"{shapes}; expected the first to have a kernel of 1")
    scale, kernel = slots.scale(down.shape[0]), tuple(down.shape[2:])
    left, right = matrix(up), matrix(down)
    if MID in slots:
        core = slots.tensor(MID, DIMENSIONS[1:])
        slots.require(
            core.shape[:2] == (up.shape[1], down.shape[0]) and set(kernel) <= {1},
            f"{shapes}, which does not fit {slots.name(MID)}, {list(core.shape)}",
        )
        kernel = tuple(core.shape[2:])
        columns = right.shape[1] * math.prod(kernel)
        right = Derived((core.shape[0], columns), (core, right), formulas.along_kernel)
    slots.require(left.shape[1] == right.shape[0], f"{shapes}; their ranks differ")
    if slots.module.table or slots.spelled[DOWN] in EMBEDDING:
        slots.require(not kernel, f"{shapes}; expected two matrices, as it is an embedding")
        return LowRank(left, right, scale, table=True).turned
    return LowRank(left, right, scale, turnable=not kernel, kernel=kernel)


def matrix(factor: Any) -> Any:
    """A factor as a matrix: its first dimension, and all others together."""
    if len(factor.shape) == 2:
        return factor
    return Derived((factor.shape[0], math.prod(factor.shape[1:])), (factor,), formulas.as_matrix)
