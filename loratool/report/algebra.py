"""What adapter algebra did, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.comparing import mean_of
from loratool.errors import escaped, printable
from loratool.report import aligned, size, spread

if TYPE_CHECKING:
    from loratool.combining.results import CombineReport
    from loratool.comparing import CompareReport, PairTotals
    from loratool.lowrank import Relation
    from loratool.rescaling import RescaleReport
    from loratool.resizing import ResizedLayer, ResizeReport


MOST_LAYERS = 8  # rows of a table before the rest is counted


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
    rows = [header, *([escaped(cell) for cell in row] for row in cells)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(header) - 1)]
    lines = ["  ".join([*(f"{c:>{w}}" for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return [*lines, *([f"… and {more} more"] if more > 0 else [])]


def percent(part: float) -> str:
    """A relative error."""
    return f"{100 * part:.3g} %" if part >= 1e-5 or part == 0 else f"{part:.1e}"


def combine_text(report: CombineReport) -> str:
    """What `combine` did, adapter by adapter and layer by layer."""
    totals = report.totals
    ranks = Counter(str(layer.rank) for layer in report.modules.values())
    settings = ", ".join(f"{name} {plain_value(value)}" for name, value in report.settings.items() if name != "method")
    rows: list[tuple[str, object]] = [
        ("combined into" if report.written else "would write", printable(report.out)),
        ("method", f"{report.method}: {settings}"),
        ("rank", spread(dict(ranks.most_common()))),
        ("factors", f"{totals.parameters:,} parameters, {size(totals.bytes)}, {report.dtype}"),
        (
            "error",
            f"{percent(totals.error)}: {percent(totals.truncated)} by the cut to this rank, {percent(totals.stored)} by "
            "rounding",
        ),
        *(
            ("adapter", f"{name}: {kept(totals.energy_kept[name])} of its energy kept, result/own norm "
             f"{number(totals.norm_ratio[name])}")
            for name in report.adapters
        ),
        *(("together", f"{pair}: {met(report, pair)}") for pair in totals.cosine),
        ("took", f"{report.seconds:.2f} s on {report.device}, torch ready after {report.startup_seconds:.2f} s"),
        ("peak memory", size(report.peak_memory)),
        *(("note", note) for note in report.notes),
    ]  # fmt: skip
    worst = sorted(report.modules.items(), key=lambda item: -item[1].error)
    cells = [
        [
            str(layer.rank),
            f"{layer.norm:.3g}",
            percent(layer.truncated),
            percent(layer.stored),
            kept(min((p.energy_kept for p in layer.parts.values() if p.energy_kept is not None), default=None)),
            number(widest([m.cosine for m in layer.meetings.values()])),
            printable(target.removesuffix(".weight")),
        ]
        for target, layer in worst[:MOST_LAYERS]
    ]
    header = ["rank", "‖ΔW‖", "cut", "stored", "least kept", "cosine", "layer"]
    return "\n".join([aligned(rows), *table(header, cells, len(worst) - MOST_LAYERS)])


def met(report: CombineReport, pair: str) -> str:
    """How much two adapters are in each other's way: the cosine of all, and means over the layers that both have."""
    found = [layer.meetings[pair] for layer in report.modules.values() if pair in layer.meetings]
    overlap, by_chance = mean_of([m.overlap_out for m in found]), mean_of([m.random_out for m in found])
    return (
        f"cosine {number(report.totals.cosine[pair])}, overlap {number(overlap)} (random {number(by_chance)}), "
        f"interference {number(mean_of([m.interference for m in found]))}, "
        f"signs {number(mean_of([m.sign_conflict for m in found]))}"
    )


def rescale_text(report: RescaleReport) -> str:
    """What `rescale` did."""
    alike = Counter(
        (f"{m.before:.6g}", f"{m.after:.6g}", "" if m.factor is None else f" (× {m.factor:.6g})")
        for m in report.modules.values()
    )
    rows: list[tuple[str, object]] = [
        ("rescaled into" if report.written else "would write", printable(report.out)),
        *(
            ("scale", f"{before} → {after}{factor} in {count} layers" + (", baked in" if report.baked else ""))
            for (before, after, factor), count in alike.most_common(MOST_LAYERS)
        ),
        *([("more", f"{len(alike) - MOST_LAYERS} other scales")] if len(alike) > MOST_LAYERS else []),
        *([("‖ΔW‖", f"{report.norm:.6g} of all layers together")] if report.norm is not None else []),
        *(("note", note) for note in report.notes),
    ]
    return aligned(rows)


def compare_text(report: CompareReport) -> str:
    """How adapters lie to each other: every pair in all, then the layers where they overlap most."""
    rows: list[tuple[str, object]] = [("‖ΔW‖", f"{value:.4g}  {name}") for name, value in report.norms.items()]
    rows += [("alone", f"{len(targets)} layers are in {name} only") for name, targets in report.alone.items()]
    rows += [("note", note) for note in report.notes]
    lines = [aligned(rows)]
    header = ["cosine", "norms", "overlap out (random)", "in (random)", "interference", "signs", "layer"]
    for pair, totals in report.totals.items():
        cells = [
            [*related_cells(totals), f"all {totals.layers} layers"],
            *(
                [*related_cells(found[pair]), printable(target.removesuffix(".weight"))]
                for target, found in sorted(
                    ((t, f) for t, f in report.modules.items() if pair in f),
                    key=lambda item: -(item[1][pair].overlap_out or 0.0),
                )[:MOST_LAYERS]
            ),
        ]
        lines += ["", pair, *table(header, cells, totals.layers - MOST_LAYERS)]
    return "\n".join(lines)


def related_cells(found: Relation | PairTotals) -> list[str]:
    return [
        number(found.cosine),
        number(found.norm_ratio),
        f"{number(found.overlap_out)} ({number(found.random_out)})",
        f"{number(found.overlap_in)} ({number(found.random_in)})",
        number(found.interference),
        number(found.sign_conflict),
    ]


def plain_value(value: object) -> str:
    return "/".join(map(plain_value, value)) if isinstance(value, (list, tuple)) else f"{value}"


def kept(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def widest(values: list[float | None]) -> float | None:
    """The value farthest from 0."""
    return max((value for value in values if value is not None), key=abs, default=None)
