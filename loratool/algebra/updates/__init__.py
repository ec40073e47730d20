"""What an adapter does to one weight, as algebra on blocks of its rows.

An update knows no names and no files. Its fields hold tensors, or descriptions of tensors that are
still on disk, so that it can be planned with before anything is read.
"""

from loratool.algebra.updates.additive import Add, LowRank, stack
from loratool.algebra.updates.base import ANY, Update
from loratool.algebra.updates.compound import Both, Chain, Fill, Image, images_in, with_weight
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors, ExpertLowRank, downs, ups
from loratool.algebra.updates.multiplying import BlockAffine, Modulated, Reflections, Rotation, Scale
from loratool.algebra.updates.products import Bases, Circulant, Grid, Hadamard, Kronecker, Pooled, Shared, Tiled
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.algebra.updates.residual import Residual
from loratool.algebra.updates.rewriting import Injection, Network, Pairs, Recomposed
from loratool.algebra.updates.sparse import Scatter, Spectrum
from loratool.algebra.updates.wavelets import Wavelet

__all__ = [
    "ANY",
    "Add",
    "Bases",
    "BlockAffine",
    "Both",
    "Chain",
    "Circulant",
    "ExpertFactors",
    "ExpertLowRank",
    "Fill",
    "Grid",
    "Hadamard",
    "Image",
    "Injection",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Modulated",
    "Network",
    "Pairs",
    "Pooled",
    "Recomposed",
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
    "Wavelet",
    "downs",
    "images_in",
    "stack",
    "ups",
    "with_weight",
]
