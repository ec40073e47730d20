"""Numerics of low-rank matrices, which are known by their factors and never formed.

Pure torch: no names, no files. Everything takes batches: leading dimensions are modules of one shape, or experts.
"""

from loratool.lowrank.core import Core, core_space
from loratool.lowrank.products import (
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
from loratool.lowrank.relations import Relation, relate
from loratool.lowrank.sketching import Rows, Sketch, sketch

__all__ = [
    "Core",
    "Decomposition",
    "Product",
    "Relation",
    "Rows",
    "Sketch",
    "canonical",
    "change",
    "core_space",
    "decompose",
    "difference",
    "gram",
    "inner",
    "length",
    "norm",
    "padded",
    "relate",
    "side_by_side",
    "singular_values",
    "sketch",
    "working_dtype",
]
