"""What `extract` did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import MOST_LAYERS, aligned, memory, percent, size, spread, table


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

    def __str__(self) -> str:
        return self.with_push(extract_text(self))


def extract_text(report: ExtractReport) -> str:
    """What differs between two checkpoints, layer by layer."""
    totals = report.totals
    ranks = Counter(str(layer.rank) for layer in report.modules.values())
    rows: list[tuple[str, object]] = [
        ("extracted into" if report.written else "would write", printable(report.out)),
        ("rule", report.rule),
        ("rank", spread(dict(ranks.most_common()))),
        ("factors", f"{totals.parameters:,} parameters, {size(totals.bytes)}, {report.dtype}"),
        ("error", f"{percent(totals.achieved)} of ‖M‖ as stored, {percent(totals.predicted)} by truncation"),
        ("tensors", f"{report.identical} identical" + (f", {report.excluded} excluded" if report.excluded else "")),
        *some("saved whole", [printable(name) for name in report.saved]),
        *some("noise only", [printable(name) for name in report.noise]),
        *some("left out", [f"{printable(name)}: {reason}" for name, reason in report.left_out.items()]),
        (
            "took",
            f"{report.cost.seconds:.2f} s on {report.cost.device}, start-up {report.cost.startup_seconds:.2f} s",
        ),
        ("peak memory", memory(report.cost.peak_memory)),
        *(("note", note) for note in report.notes),
    ]
    return "\n".join([aligned(rows), *extracted_lines(report.modules)])


def some(label: str, lines: list[str]) -> list[tuple[str, object]]:
    """A row for each of the first lines, and one that counts the others."""
    rows: list[tuple[str, object]] = [(label, line) for line in lines[:MOST_LAYERS]]
    return rows + ([(label, f"… and {len(lines) - MOST_LAYERS} more")] if len(lines) > MOST_LAYERS else [])


def extracted_lines(modules: Mapping[str, ExtractedLayer]) -> list[str]:
    """A table of layers, those that lose most first."""
    worst = sorted(modules.items(), key=lambda item: -item[1].achieved)
    header = ["rank", "‖M‖", "‖M‖/‖W‖", "by rank", "stored", "above noise", "layer"]
    cells = [
        [
            str(layer.rank),
            f"{layer.norm:.3g}",
            f"{layer.relative:.2g}",
            percent(layer.predicted),
            percent(layer.achieved),
            str(layer.above_noise),
            printable(target.removesuffix(".weight")),
        ]
        for target, layer in worst[:MOST_LAYERS]
    ]
    return table(header, cells, len(worst) - MOST_LAYERS)
