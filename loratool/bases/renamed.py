"""Weights of a GGUF model as transformers has them: its names, and rows in its order.

    base = renamed(decoded(open_checkpoint("model.gguf")))
    weight = weight_of(base, "model.layers.0.self_attn.q_proj.weight")

What transformers holds otherwise, such as the experts of a layer, has no such weight; `why_not` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.adapters.gguf_names import in_model
from loratool.bases.binding.named import Named, named
from loratool.bases.decoded import weight_of as stored_weight
from loratool.bases.weights import OfAnother, Room, StoredWeight
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile
from loratool.layouts.gguf import ARCHITECTURES, STACKS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loratool.algebra.updates.reordered import RowOrder


@dataclass(frozen=True)
class InOrder(OfAnother):
    """A matrix whose rows are stored in another order."""

    order: RowOrder

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        stored = self.order.back(self.shape[0])[first : first + count]
        start, stop = int(stored.min()), int(stored.max()) + 1  # of one head, or of few: little else is read
        return self.whole.rows(start, stop - start, device, dtype, room)[(stored - start).to(device)]


def renamed(base: Checkpoint) -> Checkpoint:
    """A model of llama.cpp's as transformers has it; any other as it is, GGUF files of image models too."""
    first = base.shards[0] if base.shards else None
    known = isinstance(first, GgufFile) and first.text("general.architecture") in ARCHITECTURES
    return (named(base) if known else None) or base


def weight_of(base: Checkpoint, name: str) -> StoredWeight:
    """A weight of a base, by the name that it has there."""
    if not isinstance(base, Named):
        return stored_weight(base, name)
    there = base.in_files[name]
    weight, order = stored_weight(base.held, there), base.rows[there].order
    return weight if order is None or not is_ordered(base, there) else InOrder(weight, order)


def is_ordered(base: Named, there: str) -> bool:
    """Whether the rows of a tensor of the file, if it is a matrix, can be put into the order of transformers."""
    order, shape = base.rows[there].order, base.held.tensors[there].shape
    return order is not None and len(shape) == 2 and order.fits(shape[0])


def why_not(base: Checkpoint, name: str) -> str:
    """Why a difference of a weight can be none of an adapter's; empty where it can."""
    if not isinstance(base, Named) or name not in base.in_files or not isinstance(first := base.shards[0], GgufFile):
        return ""
    there = base.in_files[name]
    found, row = in_model(there, ARCHITECTURES[first.text("general.architecture")]), base.rows[there]
    if not found.known:
        return "its name in transformers is not known"
    if row.shifted:
        return "a GGUF file stores it with 1 added to it"
    if any(found.name.endswith(stack) for stack in STACKS.values()):
        return "it holds all experts of a layer, which transformers holds otherwise"
    if row.order is not None and not is_ordered(base, there):
        return "a GGUF file stores its rows in another order"
    return ""
