"""Numerics of low-rank matrices, which are known by their factors and never formed.

Pure torch: no names, no files. Everything takes batches: leading dimensions are modules of one shape, or experts.
"""

from loratool.algebra.lowrank.core import Core, core_space
from loratool.algebra.lowrank.joint import Joint, Spectrum, joint, truncated
from loratool.algebra.lowrank.noise import floor, floor_of, is_noise, silenced
from loratool.algebra.lowrank.products import (
    Decomposition,
    Product,
    canonical,
    change,
    decompose,
    difference,
    gram,
    inner,
    length,
    norm,
    padded,
    side_by_side,
    singular_values,
    working_dtype,
)
from loratool.algebra.lowrank.relations import Relation, relate
from loratool.algebra.lowrank.sketching import Rows, Sketch, sketch

__all__ = [
    "Core",
    "Decomposition",
    "Joint",
    "Product",
    "Relation",
    "Rows",
    "Sketch",
    "Spectrum",
    "canonical",
    "change",
    "core_space",
    "decompose",
    "difference",
    "floor",
    "floor_of",
    "gram",
    "inner",
    "is_noise",
    "joint",
    "length",
    "norm",
    "padded",
    "relate",
    "side_by_side",
    "silenced",
    "singular_values",
    "sketch",
    "truncated",
    "working_dtype",
]
