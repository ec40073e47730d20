"""What `combine` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.compare import Meeting
from loratool.results.text import (
    aligned,
    cost_rows,
    counts,
    kept,
    mean_of,
    number,
    percent,
    spread,
    worst_first,
)
from loratool.shown import size


@dataclass(frozen=True)
class Part:
    """What became of one adapter in one layer."""

    weight: float
    norm: float  # ‖ΔW‖, weight not included
    energy_kept: float | None  # ‖U'U'ᵀ ΔW V'V'ᵀ‖² / ‖ΔW‖² with the singular vectors of the result
    norm_ratio: float | None  # ‖result‖ / ‖w ΔW‖


@dataclass(frozen=True)
class CombinedLayer:
    """One layer of the result. Errors are relative to what the method gives at full rank, Frobenius."""

    rank: int
    norm: float
    whole: float  # ‖what the method gives at full rank‖
    truncated: float  # error of the cut to `rank`
    stored: float  # error of rounding to the stored dtype, relative to the cut result
    error: float  # both together
    parts: Mapping[str, Part]  # by adapter
    meetings: Mapping[str, Meeting]  # "one × other"
    cancels: str = ""  # "zero" or "unscaled": what became of a sum that is no more than the rounding of its factors

    @property
    def least_kept(self) -> float | None:
        """The energy of the adapter of which it keeps least."""
        return min((part.energy_kept for part in self.parts.values() if part.energy_kept is not None), default=None)

    @property
    def widest_cosine(self) -> float | None:
        """That of the two most related adapters."""
        cosines = [meeting.cosine for meeting in self.meetings.values() if meeting.cosine is not None]
        return max(cosines, key=abs, default=None)


@dataclass(frozen=True)
class CombinedTotals:
    """All layers together; norms add up as squares."""

    norm: float
    truncated: float
    stored: float
    error: float
    energy_kept: Mapping[str, float | None]  # by adapter
    norm_ratio: Mapping[str, float | None]
    cosine: Mapping[str, float | None]  # "one × other"
    parameters: int
    bytes: int  # of factors


@dataclass(frozen=True, repr=False)
class CombineReport(Written):
    """What `combine` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    method: str
    settings: Mapping[str, Any]
    adapters: tuple[str, ...]
    totals: CombinedTotals
    modules: Mapping[str, CombinedLayer]  # by target
    dtype: str
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What `combine` did, adapter by adapter and layer by layer."""
        totals = self.totals
        settings = ", ".join(
            f"{name} {plain_value(value)}" for name, value in self.settings.items() if name != "method"
        )
        rows: list[tuple[str, object]] = [
            ("combined into" if self.written else "would write", printable(self.out)),
            ("method", f"{self.method}: {settings}"),
            ("rank", spread(counts(layer.rank for layer in self.modules.values()))),
            ("factors", f"{totals.parameters:,} parameters, {size(totals.bytes)}, {self.dtype}"),
            (
                "error",
                f"{percent(totals.error)}: {percent(totals.truncated)} by truncation to this rank, "
                f"{percent(totals.stored)} by rounding",
            ),
            *(("adapter", f"{name}: {share(totals, name)}") for name in self.adapters),
            *(("pair", f"{pair}: {met(self, pair)}") for pair in totals.cosine),
            *cost_rows(self.cost),
            *(("note", note) for note in self.notes),
        ]  # fmt: skip
        layers = worst_first(
            ["rank", "‖ΔW‖", "truncated", "stored", "least kept", "cosine", "layer"],
            self.modules,
            lambda layer: layer.error,
            lambda layer: [
                str(layer.rank),
                f"{layer.norm:.3g}",
                percent(layer.truncated),
                percent(layer.stored),
                kept(layer.least_kept),
                number(layer.widest_cosine),
            ],
        )
        return f"{aligned(rows)}\n{layers}"


def share(totals: CombinedTotals, name: str) -> str:
    """What is left of an adapter; one whose updates are all zero adds nothing."""
    if totals.energy_kept[name] is None and totals.norm_ratio[name] is None:
        return "adds nothing"
    ratio = number(totals.norm_ratio[name])
    return (
        f"{kept(totals.energy_kept[name])} of its energy kept, norm of the result {ratio} × that of its weighted update"
    )


def met(report: CombineReport, pair: str) -> str:
    """How much two adapters are in each other's way: the cosine of all, and means over the layers that both have."""
    found = [layer.meetings[pair] for layer in report.modules.values() if pair in layer.meetings]
    overlap, by_chance = mean_of([m.overlap_out for m in found]), mean_of([m.random_out for m in found])
    return (
        f"cosine {number(report.totals.cosine[pair])}, overlap {number(overlap)} (random {number(by_chance)}), "
        f"interference {number(mean_of([m.interference for m in found]))}, "
        f"signs {number(mean_of([m.sign_conflict for m in found]))}"
    )


def plain_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "/".join(map(plain_value, value)) if isinstance(value, (list, tuple)) else f"{value}"
