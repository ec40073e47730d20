"""What `extract` did, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.errors import printable
from loratool.report import aligned, size, spread
from loratool.report.algebra import MOST_LAYERS, percent, table

if TYPE_CHECKING:
    from loratool.extracting.results import ExtractedLayer, ExtractReport


def extract_text(report: ExtractReport) -> str:
    """What differs between two checkpoints, layer by layer."""
    totals = report.totals
    ranks = Counter(str(layer.rank) for layer in report.modules.values())
    rows: list[tuple[str, object]] = [
        ("extracted into" if report.written else "would write", printable(report.out)),
        ("rule", report.rule),
        ("rank", spread(dict(ranks.most_common()))),
        ("factors", f"{totals.parameters:,} parameters, {size(totals.bytes)}, {report.dtype}"),
        ("error", f"{percent(totals.achieved)} of ‖M‖ as stored, {percent(totals.predicted)} by rank"),
        ("tensors", f"{report.identical} identical" + (f", {report.excluded} excluded" if report.excluded else "")),
        *some("saved whole", [printable(name) for name in report.saved]),
        *some("noise only", [printable(name) for name in report.noise]),
        *some("left out", [f"{printable(name)}: {reason}" for name, reason in report.left_out.items()]),
        ("took", f"{report.seconds:.2f} s on {report.device}, torch ready after {report.startup_seconds:.2f} s"),
        ("peak memory", size(report.peak_memory)),
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
