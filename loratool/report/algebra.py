"""What adapter algebra did, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.errors import printable
from loratool.report import aligned, size, spread

if TYPE_CHECKING:
    from loratool.resizing import ResizedLayer, ResizeReport


MOST_LAYERS = 12  # rows of a table before the rest is counted


def resize_text(report: ResizeReport) -> str:
    """What `resize` did, layer by layer."""
    totals = report.totals
    ranks = Counter(str(layer.rank) for layer in report.modules.values())
    rows: list[tuple[str, object]] = [
        ("resized into" if report.written else "would write", printable(report.out)),
        ("rule", report.rule),
        ("rank", spread(dict(ranks.most_common()))),
        ("parameters", f"{totals.parameters:,} of {totals.parameters_before:,}"),
        ("factors", f"{size(totals.bytes)} of {size(totals.bytes_before)}, {report.dtype}"),
        ("error", f"{percent(totals.achieved)} of ‖ΔW‖ as stored, {percent(totals.predicted)} by truncation"),
        ("took", f"{report.seconds:.2f} s on {report.device}, torch ready after {report.startup_seconds:.2f} s"),
        ("peak memory", size(report.peak_memory)),
        *(
            ("left out", f"{printable(target)}: the budget leaves it no rank")
            for target in report.dropped[:MOST_LAYERS]
        ),
        *(("note", note) for note in report.notes),
    ]
    return "\n".join([aligned(rows), *resized_lines(report.modules)])


def resized_lines(modules: Mapping[str, ResizedLayer]) -> list[str]:
    """A table of layers, those that lose most first."""
    worst = sorted(modules.items(), key=lambda item: -item[1].achieved)
    weighed = any(layer.activations is not None for layer in modules.values())
    header = ["rank", "‖ΔW‖", "truncated", "stored", *(["outputs"] if weighed else []), "layer"]
    cells = [
        [
            f"{layer.rank_before} → {layer.rank}",
            f"{layer.norm:.3g}",
            percent(layer.predicted),
            percent(layer.achieved),
            *([percent(layer.activations or 0.0)] if weighed else []),
            printable(target.removesuffix(".weight")),
        ]
        for target, layer in worst[:MOST_LAYERS]
    ]
    return table(header, cells, len(worst) - MOST_LAYERS)


def table(header: list[str], cells: list[list[str]], more: int) -> list[str]:
    """Rows in columns, numbers to the right and the last column, a name, to the left."""
    rows = [header, *cells]
    widths = [max(len(row[at]) for row in rows) for at in range(len(header) - 1)]
    lines = ["  ".join([*(f"{c:>{w}}" for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return [*lines, *([f"… and {more} more"] if more > 0 else [])]


def percent(part: float) -> str:
    """A relative error."""
    return f"{100 * part:.3g} %" if part >= 1e-5 else f"{part:.1e}"
