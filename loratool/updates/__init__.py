"""What an adapter does to one weight, as algebra on blocks of its rows.

An update knows no names and no files. Its fields hold tensors, or descriptions of tensors that are
still on disk, so that it can be planned with before anything is read.
"""

from loratool.updates.additive import Add, LowRank, stack
from loratool.updates.base import Update
from loratool.updates.dora import Magnitude
from loratool.updates.experts import ExpertFactors, ExpertLowRank
from loratool.updates.replacing import Replace, ReplaceRows

__all__ = ["Add", "ExpertFactors", "ExpertLowRank", "LowRank", "Magnitude", "Replace", "ReplaceRows", "Update", "stack"]
