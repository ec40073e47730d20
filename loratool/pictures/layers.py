"""What the pages of commands that change every layer of an adapter have in common: maps and a table, linked by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from loratool.grouping import by_key
from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Column, Group, Table, Value
from loratool.pictures.heat_map import HeatMap
from loratool.pictures.modules import bare, places_of
from loratool.results.text import plural

Layer = TypeVar("Layer")
Number = float | int | None


@dataclass(frozen=True)
class Measure(Generic[Layer]):
    """A number of every layer: a column of the table."""

    name: str
    about: str
    of: Callable[[Layer], Number]


@dataclass(frozen=True)
class Map(Generic[Layer]):
    """A measure that has a heat map."""

    name: str  # of its file
    title: str
    about: str
    measure: Measure[Layer]
    bounds: tuple[float | None, float | None] = (None, None)  # of the colours; None: that of the values
    scale: Literal["up", "down", "both"] = "up"


class Layers(Generic[Layer]):
    """Layers by target, in the order of a table."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.places = places_of(layers)
        self.layers = {target: layers[target] for target in self.places.by_layer}
        self.entries = {target: at for at, target in enumerate(self.layers)}

    def heat_map(self, each: Map[Layer], linked: bool = True) -> HeatMap:
        """A cell for each layer, linked with its row of the table if the page has one."""
        values = {target: each.measure.of(layer) for target, layer in self.layers.items()}
        return HeatMap(
            name=each.name,
            title=each.title,
            about=each.about,
            rows=self.places.rows,
            columns=self.places.columns,
            cells=self.places.cells(values, self.entries if linked else None),
            scale=each.scale,
            bounds=each.bounds,
            what=each.measure.name,
        )

    def group(self, maps: Sequence[Map[Layer]]) -> Group:
        """The maps under one heading; the reader may colour the first one by any column, if no sign is shown by it."""
        title = maps[0].title if len(maps) == 1 else "Layers and modules"
        return Group(title, "", [self.heat_map(each) for each in maps], chooses=maps[0].scale == "up")

    def table(self, measures: Sequence[Measure[Layer]], what: str = "module") -> Table:
        """All numbers of all layers, each of which is a `what`; columns that no layer has a number for are left out."""
        shown = [each for each in measures if any(each.of(layer) is not None for layer in self.layers.values())]
        columns = [Column(what.rpartition(" ")[2]), *(Column(each.name, each.about) for each in shown)]
        rows: list[tuple[Value, ...]] = [
            (bare(target), *(each.of(layer) for each in shown)) for target, layer in self.layers.items()
        ]
        return Table(plural(len(rows), what), columns, rows, linked=True)

    def by_kind(self, measure: Callable[[Layer], float]) -> Iterator[tuple[str, list[float]]]:
        """The values of each kind of module."""
        found = by_key((row, measure(self.layers[target])) for target, (row, _) in self.places.of.items())
        yield from ((self.places.rows[row], values) for row, values in sorted(found.items()))


def rank_group(layers: Layers[Layer], rank: Callable[[Layer], int]) -> Iterator[Group]:
    """Where the ranks went; nothing where all are the same."""
    ranks = [rank(layer) for layer in layers.layers.values()]
    if len(set(ranks)) < 2:
        return
    measure = Measure[Layer]("rank", "", rank)
    about = "How the ranks are spread over the layers."
    spread = layers.heat_map(Map("ranks", "Rank by layer and module", about, measure))
    bars = [
        Bar(kind, (sum(values),), f"{sum(values):,.0f}: {min(values):.0f} to {max(values):.0f}, {len(values)} modules")
        for kind, values in layers.by_kind(rank)
    ]
    total = Bars(
        name="rank-budget",
        title="Ranks of each kind of module, added up",
        about=f"Of {sum(ranks):,} ranks in total, those of each kind of module.",
        bars=tuple(bars),
    )
    yield Group("Rank budget", "", [spread, total])


def ends_of(numbers: Iterable[object]) -> str:
    """One number, or the smallest and the largest of several."""
    ordered = sorted({*map(str, numbers)}, key=float)
    return " … ".join((ordered[0], ordered[-1])[: len(ordered)]) if ordered else "–"


def energy(error: float) -> float:
    """The part of ‖ΔW‖² that a best approximation with a relative error keeps."""
    return max(0.0, 1 - error * error)
