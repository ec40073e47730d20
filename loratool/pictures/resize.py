"""The page of `resize`: the energy that each layer keeps, and how the ranks are spread."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.pictures.blocks import Block, Facts, Tiles
from loratool.pictures.layers import Layers, Map, Measure, ends_of, energy, rank_group
from loratool.pictures.page import Page
from loratool.results.resize import ResizedLayer, ResizeReport
from loratool.results.text import cost_rows, kept, percent
from loratool.shown import size

KEPT = Measure[ResizedLayer]("energy kept", "‖ΔW'‖² / ‖ΔW‖² as stored", lambda layer: energy(layer.achieved))
MEASURES = (
    Measure[ResizedLayer]("rank before", "", lambda layer: layer.rank_before),
    Measure[ResizedLayer]("rank", "", lambda layer: layer.rank),
    Measure[ResizedLayer]("‖ΔW‖", "Frobenius norm before", lambda layer: layer.norm),
    KEPT,
    Measure[ResizedLayer]("truncated", "relative error of the truncation", lambda layer: layer.predicted),
    Measure[ResizedLayer]("stored", "relative error as stored, rounding included", lambda layer: layer.achieved),
    Measure[ResizedLayer]("outputs", "predicted relative error of ΔW·x", lambda layer: layer.activations),
)


def page_of(report: ResizeReport) -> Page:
    """The page of one adapter."""
    return Page(report.out.name, "resize", tuple(blocks(report)))


def blocks(report: ResizeReport) -> Iterator[Block]:
    totals = report.totals
    yield Tiles(
        [
            ("rank", ends_of(layer.rank for layer in report.modules.values())),
            ("energy kept", kept(energy(totals.achieved))),
            ("error", percent(totals.achieved)),
            ("parameters", f"{totals.parameters:,}"),
            ("before", f"{totals.parameters_before:,}"),
            ("factors", size(totals.bytes)),
        ]
    )
    if report.modules:
        layers = Layers(report.modules)
        about = "The part of the squared norm of every update that its new rank keeps; the table has the same numbers."
        yield layers.group([Map("energy", "Energy kept by layer and module", about, KEPT, (None, 1.0))])
        yield from rank_group(layers, lambda layer: layer.rank)
        yield layers.table(MEASURES)
    yield Facts(
        "Facts",
        [
            ("resized into" if report.written else "would write", report.out),
            ("rule", report.rule),
            ("dtype", report.dtype),
            ("by truncation", f"{percent(totals.predicted)} of ‖ΔW‖"),
            *(("left out", f"{target}: the budget is too small to keep any rank") for target in report.dropped),
            *cost_rows(report.cost),
            *(("note", note) for note in report.notes),
        ],
    )
