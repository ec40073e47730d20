"""What `extract` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import MOST_LAYERS, aligned, cost_rows, counts, percent, shortened, spread, worst_first
from loratool.shown import size


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer. Errors are relative: ‖M − ΔW‖ / ‖M‖, Frobenius, with M = W_tuned − W_base."""

    rank: int
    norm: float  # ‖M‖
    relative: float  # ‖M‖ / ‖W_base‖
    predicted: float  # error of the rank, from ‖M‖² and the singular values
    achieved: float  # error of what is stored, rounding included
    above_noise: int  # of the singular values that were looked for, those larger than rounding can make


@dataclass(frozen=True)
class ExtractedTotals:
    """All layers together, those left out as noise among them; norms add up as squares."""

    norm: float
    predicted: float
    achieved: float
    parameters: int
    bytes: int  # of factors


@dataclass(frozen=True, repr=False)
class ExtractReport(Written):
    """What `extract` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    rule: str
    totals: ExtractedTotals
    modules: Mapping[str, ExtractedLayer]  # by target
    noise: Mapping[str, ExtractedLayer]  # targets left out, since rounding alone explains what differs
    identical: int  # tensors
    excluded: int  # tensors that differ and were not asked for
    saved: tuple[str, ...]  # tensors that are saved whole
    left_out: Mapping[str, str]  # tensor that differs → why nothing of it is in the adapter
    dtype: str
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What differs between two checkpoints, layer by layer."""
        totals = self.totals
        left_out = [(printable(name), reason) for name, reason in self.left_out.items()]
        rows: list[tuple[str, object]] = [
            ("extracted into" if self.written else "would write", printable(self.out)),
            ("rule", self.rule),
            ("rank", spread(counts(layer.rank for layer in self.modules.values()))),
            ("factors", f"{totals.parameters:,} parameters, {size(totals.bytes)}, {self.dtype}"),
            (
                "error",
                f"{percent(totals.achieved)} of the difference M as stored, {percent(totals.predicted)} by truncation",
            ),
            ("tensors", f"{self.identical} identical" + (f", {self.excluded} excluded" if self.excluded else "")),
            *(("saved whole", line) for line in shortened([*map(printable, self.saved)], MOST_LAYERS)),
            *(("noise only", line) for line in shortened([*map(printable, self.noise)], MOST_LAYERS)),
            *(("left out", line) for line in shortened([*map(": ".join, left_out)], MOST_LAYERS)),
            *cost_rows(self.cost),
            *(("note", note) for note in self.notes),
        ]
        header = ["rank", "‖M‖", "‖M‖/‖W‖", "by rank", "stored", "above noise", "layer"]
        layers = worst_first(
            header,
            self.modules,
            lambda layer: layer.achieved,
            lambda layer: [
                str(layer.rank),
                f"{layer.norm:.3g}",
                f"{layer.relative:.2g}",
                percent(layer.predicted),
                percent(layer.achieved),
                str(layer.above_noise),
            ],
        )
        return f"{aligned(rows)}\n{layers}"
