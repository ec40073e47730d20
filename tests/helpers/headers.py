"""Bases and adapters as names and shapes alone, in memory, for what is decided without values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loratool.adapters.adapter import Adapter, StoredTensor
from loratool.adapters.formats.peft.training import training_of
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.dora import Magnitude
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import Identity, Layout, SafeFile

if TYPE_CHECKING:
    from loratool.algebra.updates.base import Update
    from loratool.bases.binding import Bound

RANK = 2
Shape = tuple[int, ...]
NOWHERE = Path("nowhere")


@dataclass(frozen=True)
class Headers(Checkpoint):
    """A checkpoint without files, with a config."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.settings


def base_of(shapes: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None, **settings: Any) -> Headers:
    layout = Layout.of((name, (dtypes or {}).get(name, "F32"), shape) for name, shape in shapes.items())
    return Headers(NOWHERE, (SafeFile(NOWHERE / "model.safetensors", layout, Identity(0, 0, 0, 0)),), settings=settings)


def stored(name: str, shape: Shape) -> Any:
    layout = Layout.of([(name, "F32", shape)])
    return StoredTensor(SafeFile(NOWHERE / "adapter.safetensors", layout, Identity(0, 0, 0, 0)), layout.tensors[name])


def lora(shape: Shape) -> LowRank:
    """LoRA of a linear layer (out, in)."""
    return LowRank(stored("B", (shape[0], RANK)), stored("A", (RANK, shape[1])), 1.0, turnable=True)


def dora(shape: Shape) -> Magnitude:
    return Magnitude(lora(shape), stored("m", shape[:1]))


def experts(count: int, a_side: int, b_side: int) -> ExpertFactors:
    """Factors of all experts: A has `a_side` columns and B `b_side` rows."""
    return ExpertFactors(stored("A", (count * RANK, a_side)), stored("B", (b_side, RANK * count)), 1.0)


def bias(length: int) -> Add:
    return Add(stored("bias", (length,)))


def saved(shape: Shape) -> Replace:
    return Replace(stored("value", shape))


def adapter_of(updates: Mapping[str, Update | Shape], **config: Any) -> Adapter:
    """An adapter with the given updates; a shape stands for LoRA of a linear layer."""
    made = {name: lora(update) if isinstance(update, tuple) else update for name, update in updates.items()}
    file = stored("A", (1, 1)).file
    training = training_of(config)
    return Adapter(
        "adapter", "peft", NOWHERE, file, config, NOWHERE / "adapter_config.json", made, {}, training=training
    )


def landed(bound: Bound) -> dict[str, set[str]]:
    """Target → the tensors it lands on."""
    return {target: {place.tensor for place in places} for target, places in bound.places.items()}


def rows_from(bound: Bound, base: Checkpoint, targets: Iterable[str]) -> dict[str, Tensor]:
    """For each tensor, which row of which target each of its elements takes.

    An element is 1000 · (number of the target, from 1 on) + the row of the target's update; 0 where nothing goes.
    For an update that is turned round, what counts is its column.
    """
    found = {name: torch.zeros(info.shape, dtype=torch.long) for name, info in base.tensors.items()}
    for number, target in enumerate(targets, 1):
        for place in bound.places[target]:
            tensor = found[place.tensor]
            rows = 1
            for size in tensor.shape[: place.fold]:
                rows *= size
            part = tensor.view(rows, -1)[place.first_row : place.first_row + place.rows, place.columns]
            assert part.shape[0] == place.rows, "rows outside the tensor"
            if place.columns == slice(None):
                value = torch.arange(place.update_row, place.update_row + place.rows)[:, None].expand_as(part)
            else:
                value = torch.arange(part.shape[1])[None, :].expand_as(part)
            assert not part.any(), "an element is edited twice"
            part.copy_(value + 1000 * number)
    return found
