"""What the tensors of GGUF files are in transformers: names, and the order of rows; and what an adapter's metadata call it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loratool.adapters.model_settings import Heads
from loratool.algebra.updates.reordered import RowOrder
from loratool.layouts.gguf import HEADS, STACKS, Architecture, Rows
from loratool.lazy import Tensor

A, B = ".lora_a", ".lora_b"
ALPHA, REPOSITORY, HUB = "adapter.lora.alpha", "general.base_model.0.repo_url", "https://huggingface.co/"
BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<module>.+)")


def base_in(place: str) -> str:
    """The base's id on the Hub, where the address of its repository is there."""
    return place.removeprefix(HUB) if place.startswith(HUB) else ""


@dataclass(frozen=True)
class InModel:
    """What a tensor of a GGUF file is in the model."""

    name: str
    layer: int = 0
    rows: Rows | None = None  # where they are in another order
    shifted: bool = False  # it holds 1 + w
    known: bool = True  # whether a table names it


def in_model(name: str, architecture: Architecture) -> InModel:
    """What a tensor is in transformers; one that no table knows keeps its name."""
    module, _, parameter = name.rpartition(".")
    match = BLOCK.fullmatch(module)
    inner = match["module"] if match else module
    shifted = architecture.norms_shifted and inner.endswith("norm")
    if match is None:
        there = architecture.outside.get(module)
        return InModel(f"{there}.{parameter}" if there else name, shifted=shifted, known=bool(there))
    at, layer = f"{architecture.layers}.{match['layer']}", int(match["layer"])
    if inner in STACKS and parameter == "weight":
        return InModel(f"{at}.{STACKS[inner]}", layer)
    if inner not in architecture.modules:
        return InModel(name, layer, known=False)
    return InModel(f"{at}.{architecture.modules[inner]}.{parameter}", layer, architecture.rows.get(inner), shifted)


def order_of(rows: Rows, heads: Heads) -> RowOrder:
    """An entry of the table for a model with so many heads."""
    groups = heads.queries if rows.groups == HEADS else heads.keys
    return RowOrder(groups, tuple(count or heads.each for count in rows.parts))


@dataclass(frozen=True)
class Back:
    """Rows as a GGUF file has them, in the model's order."""

    order: RowOrder

    def __call__(self, rows: Tensor) -> Tensor:
        return rows[self.order.back(len(rows)).to(rows.device)]
