"""The sketch of an adapter's update, and what is to be known of it to compare it with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loratool.results.text import COLUMNS, table


@dataclass(frozen=True)
class SketchFacts:
    """What it takes to compare a sketch: distances are of adapters of one base, with the same `names`."""

    names: Literal["base", "as stored"]  # under which weights were hashed: the base's, or the adapter's own
    norm: float  # ‖ΔW‖, from the factors
    rounding: float  # relative error of ΔW that comes of the dtype its factors are stored in
    spread: float  # relative error of a distance: root mean square, at most
    saved: str  # SHA-256 of all that the adapter holds besides factors; empty where there is nothing


@dataclass(frozen=True)
class Neighbour:
    """An adapter of an index, and how far it is."""

    name: str
    distance: float  # estimate of ‖ΔW₁ − ΔW₂‖
    error: float  # of the distance, root mean square
    relative: float  # distance / the larger of the two norms
    same: Literal["", "same update", "same update, other saved tensors"]
    path: str


def neighbours_text(near: Sequence[Neighbour]) -> str:
    """Adapters of an index by their distances."""
    cells = [
        [f"{each.distance:.4g} ± {each.error:.2g}", f"{100 * each.relative:.3g} %", each.same or "–", each.name]
        for each in near
    ]
    return table(["‖ΔW − ΔW'‖", "of the larger ‖ΔW‖", "same", "adapter"], cells, room=COLUMNS)
