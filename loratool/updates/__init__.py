"""What an adapter does to one weight, as algebra on blocks of its rows.

An update knows no names and no files. Its fields hold tensors, or descriptions of tensors that are
still on disk, so that it can be planned with before anything is read.
"""

from loratool.updates.additive import Add, LowRank, stack
from loratool.updates.base import ANY, Update
from loratool.updates.dora import Magnitude
from loratool.updates.experts import ExpertFactors, ExpertLowRank
from loratool.updates.multiplying import BlockAffine, Chain, Modulated, Reflections, Rotation, Scale
from loratool.updates.products import Circulant, Grid, Hadamard, Kronecker, Pooled, Shared, Tiled
from loratool.updates.replacing import Replace, ReplaceRows
from loratool.updates.residual import Residual
from loratool.updates.sparse import Scatter, Spectrum

__all__ = [
    "ANY",
    "Add",
    "BlockAffine",
    "Chain",
    "Circulant",
    "ExpertFactors",
    "ExpertLowRank",
    "Grid",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Modulated",
    "Pooled",
    "Reflections",
    "Replace",
    "ReplaceRows",
    "Residual",
    "Rotation",
    "Scale",
    "Scatter",
    "Shared",
    "Spectrum",
    "Tiled",
    "Update",
    "stack",
]
