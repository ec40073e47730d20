"""Weights of a GGUF model as transformers has them: its names, and rows in its order.

    base = renamed(decoded(open_checkpoint("model.gguf")))
    weight = weight_of(base, "model.layers.0.self_attn.q_proj.weight")

What transformers holds otherwise, such as the experts of a layer, has no such weight; `why_not` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.adapters.gguf_names import in_model
from loratool.bases.binding.named import Row, named
from loratool.bases.decoded import weight_of as stored_weight
from loratool.bases.weights import OfAnother, Room, StoredWeight
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile
from loratool.files.safefile import TensorInfo
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

    def matrix(self, columns: int) -> StoredWeight:
        """Itself: it is a matrix. Raises `ValueError` for another number of columns."""
        if columns != self.shape[1]:
            raise ValueError(f"rows of {self.shape[1]} columns cannot be reshaped to {columns} columns")
        return self


@dataclass(frozen=True, repr=False)
class Renamed(Checkpoint):
    """A GGUF model under the names of transformers. All of its matrices are (out, in)."""

    held: Checkpoint | None = None  # the same under the names of its file
    by_name: Mapping[str, tuple[str, Row]] = field(default_factory=dict)  # name in transformers → that in the file

    is_linear = True

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        assert self.held is not None
        return {name: replace(self.held.tensors[there], name=name) for name, (there, _) in self.by_name.items()}

    def weight(self, name: str) -> StoredWeight:
        assert self.held is not None
        there, row = self.by_name[name]
        weight = stored_weight(self.held, there)
        return weight if self.is_plain(name) or row.order is None else InOrder(weight, row.order)

    def is_plain(self, name: str) -> bool:
        """Whether its rows, if it has any, are in the order of transformers."""
        row, info = self.by_name[name][1], self.tensors[name]
        return row.order is None or len(info.shape) != 2 or not row.order.fits(info.shape[0])

    def why_not(self, name: str) -> str:
        """Why a difference of a weight can be none of an adapter's; empty where it can."""
        if name not in self.by_name or not isinstance(first := self.shards[0], GgufFile):
            return ""
        there, row = self.by_name[name]
        found = in_model(there, ARCHITECTURES[first.text("general.architecture")])
        if not found.known:
            return "its name in transformers is not known"
        if row.shifted:
            return "a GGUF file stores it with 1 added to it"
        if any(found.name.endswith(stack) for stack in STACKS.values()):
            return "it holds all experts of a layer, which transformers holds otherwise"
        return "a GGUF file stores its rows in another order" if row.order is not None and self.is_plain(name) else ""


def renamed(base: Checkpoint) -> Checkpoint:
    """A model of llama.cpp's as transformers has it; any other as it is, GGUF files of image models too."""
    first = base.shards[0] if base.shards else None
    if not isinstance(first, GgufFile) or first.text("general.architecture") not in ARCHITECTURES:
        return base
    view = named(base)
    assert view is not None, "it is GGUF"
    own = {each.name: getattr(base, each.name) for each in fields(Checkpoint)}
    return Renamed(**own, held=base, by_name={row.name: (there, row) for there, row in view.rows.items()})


def weight_of(base: Checkpoint, name: str) -> StoredWeight:
    """A weight of a base, by the name that it has there."""
    return base.weight(name) if isinstance(base, Renamed) else stored_weight(base, name)
