"""The page of `extract`: what differs between two checkpoints, and how much of it an adapter of these ranks holds."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Facts, Group, Tiles
from loratool.pictures.layers import Layers, Map, Measure, ends_of, energy, rank_group
from loratool.pictures.page import Page
from loratool.results.extract import ExtractedLayer, ExtractReport
from loratool.results.text import cost_rows, kept, percent
from loratool.shown import size

KEPT = Measure[ExtractedLayer]("energy kept", "part of ‖M‖² that the adapter holds", lambda each: energy(each.achieved))
RELATIVE = Measure[ExtractedLayer]("‖M‖/‖W‖", "relative to the base's weight", lambda each: each.relative)
MEASURES = (
    Measure[ExtractedLayer]("rank", "", lambda each: each.rank),
    Measure[ExtractedLayer]("‖M‖", "Frobenius norm of the difference, M = W_tuned − W_base", lambda each: each.norm),
    RELATIVE,
    KEPT,
    Measure[ExtractedLayer]("by rank", "relative error of the rank", lambda each: each.predicted),
    Measure[ExtractedLayer]("stored", "relative error as stored, rounding included", lambda each: each.achieved),
    Measure[ExtractedLayer]("above noise", "singular values larger than rounding can make", lambda each: each.above_noise),
)  # fmt: skip
MOST_NAMES = 100  # tensors of a kind that the facts list


def page_of(report: ExtractReport) -> Page:
    """The page of one adapter."""
    return Page(report.out.name, "extract", tuple(blocks(report)))


def blocks(report: ExtractReport) -> Iterator[Block]:
    totals = report.totals
    yield Tiles(
        [
            ("rank", ends_of(layer.rank for layer in report.modules.values())),
            ("energy kept", kept(energy(totals.achieved))),
            ("error", percent(totals.achieved)),
            ("‖M‖", f"{totals.norm:.4g}"),
            ("parameters", f"{totals.parameters:,}"),
            ("factors", size(totals.bytes)),
        ]
    )
    yield Group("Tensors of the two checkpoints", "", [tensors(report)])
    if report.modules:
        layers = Layers(report.modules)
        yield layers.group(
            [
                Map("difference", "‖M‖/‖W‖ by layer and module", "How much every weight was changed.", RELATIVE),
                Map(
                    "energy",
                    "Energy kept by layer and module",
                    "The part of ‖M‖² that the adapter holds.",
                    KEPT,
                    (None, 1.0),
                ),
            ],
        )
        yield from rank_group(layers, lambda layer: layer.rank)
        yield layers.table(MEASURES)
    yield Facts("Facts", [*facts(report)])


def tensors(report: ExtractReport) -> Bars:
    found = {
        "extracted": len(report.modules),
        "saved whole": len(report.saved),
        "noise only": len(report.noise),
        "left out": len(report.left_out),
        "excluded": report.excluded,
        "identical": report.identical,
    }
    bars = [Bar(name, (float(count),), f"{count:,}") for name, count in found.items() if count]
    about = "What happened to each: extracted as factors, saved whole, a difference no larger than rounding, "
    return Bars(name="tensors", title="Tensors", about=about + "or not in the adapter.", bars=tuple(bars))


def facts(report: ExtractReport) -> Iterator[tuple[str, object]]:
    yield "extracted into" if report.written else "would write", report.out
    yield "rule", report.rule
    yield "dtype", report.dtype
    left_out = [f"{name}: {reason}" for name, reason in report.left_out.items()]
    for word, names in (("saved whole", report.saved), ("noise only", [*report.noise]), ("left out", left_out)):
        yield from ((word, name) for name in names[:MOST_NAMES])
        if len(names) > MOST_NAMES:
            yield word, f"… and {len(names) - MOST_NAMES} more; --json has all"
    yield from cost_rows(report.cost)
    yield from (("note", note) for note in report.notes)
