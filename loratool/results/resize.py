"""What `resize` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import MOST_LAYERS, aligned, cost_rows, counts, percent, row_if, spread, worst_first
from loratool.shown import size


@dataclass(frozen=True)
class ResizedLayer:
    """One layer, before and after. Errors are relative: ‖ΔW − ΔW'‖ / ‖ΔW‖, Frobenius."""

    rank_before: int
    rank: int
    norm: float  # ‖ΔW‖
    predicted: float  # error of the truncation, from the singular values
    achieved: float  # error of what is stored, rounding included
    activations: float | None = None  # predicted error of ΔW·x over the inputs of a calibration
    floor: float = 0.0  # an update with a norm up to this is no larger than the rounding of its stored factors


@dataclass(frozen=True)
class ResizedTotals:
    """All layers together; their norms add up as squares."""

    norm: float
    predicted: float
    achieved: float
    parameters_before: int
    parameters: int
    bytes_before: int  # of factors
    bytes: int


@dataclass(frozen=True, repr=False)
class ResizeReport(Written):
    """What `resize` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    rule: str
    totals: ResizedTotals
    modules: Mapping[str, ResizedLayer]  # by target
    dropped: tuple[str, ...]  # targets that a budget left nothing
    dtype: str
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What `resize` did, layer by layer."""
        totals = self.totals
        rows: list[tuple[str, object]] = [
            ("resized into" if self.written else "would write", printable(self.out)),
            ("rule", self.rule),
            ("rank", spread(counts(layer.rank for layer in self.modules.values()))),
            ("parameters", f"{totals.parameters:,} (was {totals.parameters_before:,})"),
            ("factors", f"{size(totals.bytes)} (was {size(totals.bytes_before)}), {self.dtype}"),
            ("error", f"{percent(totals.achieved)} of ‖ΔW‖ as stored, {percent(totals.predicted)} by truncation"),
            *cost_rows(self.cost),
            *(
                ("left out", f"{printable(target)}: the budget is too small to keep any rank")
                for target in self.dropped[:MOST_LAYERS]
            ),
            *row_if(len(self.dropped) > MOST_LAYERS, "", f"… and {len(self.dropped) - MOST_LAYERS} more"),
            *(("note", note) for note in self.notes),
        ]
        weighed = any(layer.activations is not None for layer in self.modules.values())
        header = ["rank", "‖ΔW‖", "truncated", "stored", *(["outputs"] if weighed else []), "layer"]
        layers = worst_first(
            header,
            self.modules,
            lambda layer: layer.achieved,
            lambda layer: [
                f"{layer.rank_before} → {layer.rank}",
                f"{layer.norm:.3g}",
                percent(layer.predicted),
                percent(layer.achieved),
                *([percent(layer.activations or 0.0)] if weighed else []),
            ],
        )
        return f"{aligned(rows)}\n{layers}"
