"""`Unsettled`: factors that make an update only once it is known what model they belong to.

Some trainers hold the rows of queries, keys and values in an order, or in one matrix, that depends on how many heads
the model has, which an adapter's own files need not tell. The base's config does, or a copy of it in the adapter's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Adapter, Derived, StoredTensor
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude

Parts = Mapping[str, Update]  # by target
WAY_OUT = "pass the model that was trained with --base, or copy its config.json into the adapter's folder"


@dataclass(frozen=True)
class Unsettled(Update):
    """Factors of which `parts` makes updates, given the config of a model."""

    b: StoredTensor | Derived  # (rows, rank)
    a: StoredTensor | Derived  # (rank, columns), or more such, one below the other
    scale: float
    parts: Callable[[Mapping[str, Any]], Parts]  # raises `ValueError` with what the config does not tell
    magnitude: StoredTensor | None = None

    @property
    def inner(self) -> LowRank:
        """Factors of the same shapes, of which rank and scaling can be told."""
        return LowRank(self.b, self.a, self.scale)  # type: ignore[arg-type]  # loaded later

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b.shape[0], self.a.shape[1])

    def fit(self, shape: tuple[int, ...]) -> Update | None:  # noqa: ARG002
        return None


def settled(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter on a model with this config: what can be settled is; the same adapter where nothing is open."""
    if not any(isinstance(update, Unsettled) for update in adapter.updates.values()):
        return adapter
    updates: dict[str, Update] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for target, update in adapter.updates.items():
        found: Parts = {target: update}
        if isinstance(update, Unsettled):
            with suppress(ValueError):
                found = update.parts(config)
        updates |= found
        sources |= dict.fromkeys(found, adapter.sources.get(target, ()))
    return replace(adapter, updates=updates, sources=sources)


def as_stored(adapter: Adapter) -> Adapter:
    """The adapter with factors as they are stored, whatever rows of a model they change."""

    def plain(update: Update) -> Update:
        if not isinstance(update, Unsettled):
            return update
        lengths: Any = update.magnitude
        return update.inner if lengths is None else Magnitude(update.inner, lengths)

    return replace(adapter, updates={target: plain(update) for target, update in adapter.updates.items()})


def open_question(update: Unsettled, config: Mapping[str, Any]) -> str:
    """What it would take to settle an update, which a config does not tell."""
    try:
        update.parts(config)
    except ValueError as error:
        return str(error)
    return ""
