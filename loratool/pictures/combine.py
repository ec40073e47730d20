"""The page of `combine`: what the result keeps of each adapter, layer by layer, and how they are related."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Facts, Group, Tiles
from loratool.pictures.heat_map import Cell, HeatMap
from loratool.pictures.layers import Layers, Map, Measure, ends_of, rank_group
from loratool.pictures.page import Page
from loratool.results.combine import CombinedLayer, CombineReport, met, plain_value
from loratool.results.text import cost_rows, kept, number, percent
from loratool.shown import size

MOST_COLUMNS = 8  # adapters that get a column of their own
MOST_MAPS, MOST_MODULES = 3, 500  # of those, that get a map, and modules up to which there is room for it


LEAST = Measure[CombinedLayer]("least kept", "energy kept of the adapter that loses most", lambda each: each.least_kept)
MEASURES = (
    Measure[CombinedLayer]("rank", "", lambda each: each.rank),
    Measure[CombinedLayer]("‖ΔW‖", "Frobenius norm of the result", lambda each: each.norm),
    Measure[CombinedLayer]("truncated", "relative error of the truncation to this rank", lambda each: each.truncated),
    Measure[CombinedLayer]("stored", "relative error of rounding", lambda each: each.stored),
    Measure[CombinedLayer]("error", "both together", lambda each: each.error),
    LEAST,
    Measure[CombinedLayer]("cosine", "of the two most related adapters", lambda each: each.widest_cosine),
)  # fmt: skip


def kept_of(adapter: str) -> Measure[CombinedLayer]:
    """How much of one adapter a layer keeps."""

    def of(layer: CombinedLayer) -> float | None:
        return layer.parts[adapter].energy_kept if adapter in layer.parts else None

    return Measure(f"kept of {adapter}", "part of its ‖ΔW‖² in the directions of the result", of)


def page_of(report: CombineReport) -> Page:
    """The page of one combination."""
    return Page(report.out.name, "combine", tuple(blocks(report)))


def blocks(report: CombineReport) -> Iterator[Block]:
    totals = report.totals
    yield Tiles(
        [
            ("method", report.method),
            ("adapters", f"{len(report.adapters)}"),
            ("rank", ends_of(layer.rank for layer in report.modules.values())),
            ("error", percent(totals.error)),
            ("parameters", f"{totals.parameters:,}"),
            ("factors", size(totals.bytes)),
        ]
    )
    figures = [adapters_kept(report), *([cosines(report)] if totals.cosine else [])]
    yield Group("Adapters", "", figures)
    if report.modules:
        layers = Layers(report.modules)
        own = [kept_of(name) for name in report.adapters[:MOST_COLUMNS]]
        shares = [share for layer in report.modules.values() if (share := layer.least_kept) is not None]
        bounds = (min(shares, default=0.0), 1.0)
        about = "The part of ‖ΔW‖² that a layer keeps of the adapter that loses most."
        maps = [Map("energy", "Least energy kept by layer and module", about, LEAST, bounds)]
        if len(own) <= MOST_MAPS and len(report.modules) <= MOST_MODULES:
            maps += [
                Map(f"energy-{at}", f"Energy {each.name}", each.about, each, bounds) for at, each in enumerate(own, 1)
            ]
        yield layers.group(maps)
        yield from rank_group(layers, lambda layer: layer.rank)
        yield layers.table([*MEASURES, *own])
    yield Facts("Facts", [*facts(report)])


def adapters_kept(report: CombineReport) -> Bars:
    """A bar for each adapter."""
    shares = report.totals.energy_kept
    bars = tuple(Bar(name, (shares[name] or 0.0,), kept(shares[name])) for name in report.adapters)
    return Bars(
        name="energy-by-adapter",
        title="Energy of each adapter that the result keeps",
        about="The part of each adapter's ‖ΔW‖², all layers together, that lies in the directions of the result.",
        bars=bars,
        longest=1.0,
    )


def cosines(report: CombineReport) -> HeatMap:
    """Every two adapters."""
    names = report.adapters
    found = {**report.totals.cosine, **{f"{name} × {name}": 1.0 for name in names}}
    cells = (
        Cell(a, b, found.get(f"{one} × {other}", found.get(f"{other} × {one}")), f"{one} × {other}")
        for a, one in enumerate(names)
        for b, other in enumerate(names)
    )
    return HeatMap(
        name="cosine",
        title="Cosine of each pair of adapters",
        about="⟨ΔWᵢ, ΔWⱼ⟩ / (‖ΔWᵢ‖ ‖ΔWⱼ‖), all layers together.",
        rows=names,
        columns=names,
        cells=tuple(cells),
        scale="both",
        bounds=(-1.0, 1.0),
        numbers=True,
        what="cosine",
    )


def facts(report: CombineReport) -> Iterator[tuple[str, object]]:
    totals = report.totals
    yield "combined into" if report.written else "would write", report.out
    yield from ((name, plain_value(value)) for name, value in report.settings.items())
    yield "error", f"{percent(totals.truncated)} by truncation to this rank, {percent(totals.stored)} by rounding"
    yield "dtype", report.dtype
    for name in report.adapters:
        yield name, f"norm of the result {number(totals.norm_ratio[name])} × that of its weighted update"
    yield from ((pair, met(report, pair)) for pair in totals.cosine)
    yield from cost_rows(report.cost)
    yield from (("note", note) for note in report.notes)
