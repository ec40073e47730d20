"""The page of `compare`: how alike adapters are as a matrix, a dendrogram and their spectra, and layer by layer of a few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratool.algebra.lowrank.relations import Relation
from loratool.pictures.blocks import Block, Column, Facts, Group, Table, Tiles
from loratool.pictures.colours import SERIES
from loratool.pictures.heat_map import Cell, HeatMap
from loratool.pictures.layers import Layers, Map, Measure
from loratool.pictures.lines import Axis, Line, Lines, counting, linear, logarithmic, thinned
from loratool.pictures.page import Page
from loratool.pictures.spectrum import energy_of
from loratool.pictures.tree import Tree
from loratool.results.compare import FEW, REASONS, CompareReport
from loratool.results.matrix import Group as Adapters, grouped, groups_of
from loratool.results.text import cost_rows, kept, number, plural

MOST_ROWS = 50  # of a matrix; of more adapters, the nearest share one
MOST_NUMBERS = 24  # rows of a matrix whose cells have their numbers in them, and of those that are not the first two
MOST_POINTS = 20_000  # of the lines of a figure; of more, some are left out
MOST_MAPS = 3  # pairs that get a map of their layers
MOST_ALONE = 20  # layers of one adapter alone that are listed
TABLES = (
    ("cosine", "Cosine", "⟨ΔWᵢ, ΔWⱼ⟩ / (‖ΔWᵢ‖ ‖ΔWⱼ‖), all layers together.", (-1.0, 1.0)),
    ("overlap_out", "Overlap of output directions", "Mean over layers of ‖UᵢᵀUⱼ‖² / min(rank).", (0.0, 1.0)),
    ("overlap_in", "Overlap of input directions", "Mean over layers of ‖VᵢᵀVⱼ‖² / min(rank).", (0.0, 1.0)),
    (
        "sign_conflict",
        "Sign conflict",
        "Part of sampled entries with opposite signs, the mean over layers.",
        (0.0, 1.0),
    ),
)


@dataclass(frozen=True)
class Rows:
    """The rows of matrices in the order of the dendrogram: an adapter each, or several that are near each other."""

    names: tuple[str, ...]
    groups: tuple[Adapters, ...]
    clusters: tuple[int, ...]  # their numbers in the tree
    merged: int  # joins of the tree that are within rows

    @property
    def about(self) -> str:
        """What is to be said where a row is several adapters."""
        count = sum(map(len, self.groups))
        return f" The nearest of {count} adapters share a row." if self.merged else ""


def rows_of(report: CompareReport) -> Rows:
    count = len(report.adapters)
    merged = max(0, count - MOST_ROWS)
    clusters, groups = zip(*grouped(count, report.tree, merged), strict=True)
    names = [report.adapters[g[0]] if len(g) == 1 else f"{report.adapters[g[0]]} and {len(g) - 1} more" for g in groups]
    return Rows(tuple(names), groups, clusters, merged)


def page_of(report: CompareReport) -> Page:
    """The page of one comparison."""
    names = report.adapters
    title = " × ".join(names) if len(names) <= FEW else f"{len(names)} adapters"
    return Page(title, "compare", tuple(blocks(report)))


def blocks(report: CompareReport) -> Iterator[Block]:
    found = report.forecast
    layers = max((totals.layers for totals in report.totals.values()), default=0)
    yield Tiles(
        [
            ("adapters", f"{len(report.adapters)}"),
            ("layers in common", f"up to {layers}" if len(report.adapters) > 2 else f"{layers}"),
            ("interference", number(found.interference)),
            ("their sum keeps", kept(found.sum_kept)),
        ]
    )
    rows = rows_of(report)
    shown = TABLES if len(rows.names) <= MOST_NUMBERS else TABLES[:2]
    yield Group("Every two", "", [matrix(report, rows, *each) for each in shown])
    if len(report.adapters) > 2:
        yield Group("Dendrogram", "", [dendrogram(report, rows)])
    in_layers = len(report.adapters) <= FEW and bool(report.modules)
    linked = not in_layers and len(report.adapters) > len(SERIES)
    chooses = " The first adapter is in front; a click on a row of the table chooses another." if linked else ""
    yield Group("Spectra", f"All modules of an adapter together.{chooses}", spectra(report, linked))
    if report.notable and len(report.adapters) > 2:
        columns = [Column("pair"), Column("why"), Column("value")]
        pairs = [(pair.pair, REASONS[pair.why].partition(",")[0], pair.value) for pair in report.notable]
        yield Table("Pairs worth knowing about", columns, pairs)
    if in_layers:
        yield from layer_blocks(report)
    yield adapter_table(report, linked)
    yield Facts("Facts", [*facts(report)])


def matrix(
    report: CompareReport, rows: Rows, name: str, title: str, about: str, bounds: tuple[float, float]
) -> HeatMap:
    """One measure of every two adapters."""
    table = groups_of(getattr(report.matrix, name), rows.groups)
    cells = tuple(
        Cell(i, j, value, f"{rows.names[i]} × {rows.names[j]}")
        for i, line in enumerate(table)
        for j, value in enumerate(line)
    )
    return HeatMap(
        name=name.replace("_", "-"),
        title=title,
        about=about + rows.about,
        rows=rows.names,
        columns=rows.names,
        cells=cells,
        scale="both" if bounds[0] < 0 else "up",
        bounds=bounds,
        numbers=len(rows.names) <= MOST_NUMBERS,
        what=title.lower(),
    )


def dendrogram(report: CompareReport, rows: Rows) -> Tree:
    """How the rows cluster."""
    numbers = {cluster: at for at, cluster in enumerate(rows.clusters)}
    joins = []
    for at, join in enumerate(report.tree[rows.merged :], len(report.adapters) + rows.merged):
        numbers[at] = len(numbers)
        joins.append((numbers[join.one], numbers[join.other], join.distance))
    largest = max((join.distance for join in report.tree), default=0.0)
    return Tree(
        name="dendrogram",
        title="Dendrogram",
        about="The farther right two are joined, the less alike they are." + rows.about,
        leaves=rows.names,
        joins=tuple(joins),
        axis=linear("1 − cosine, the mean over pairs", 0.0, largest or 1.0),
    )


def spectra(report: CompareReport, linked: bool) -> list[Lines]:
    """The spectra of all adapters over each other, and the energy that smaller ranks keep."""
    spectra = {name: values for name, values in report.spectra.items() if values and values[0] > 0}
    ranks = max([1, *map(len, spectra.values())])
    entries = {name: at if linked else None for at, name in enumerate(report.adapters)}
    relative = {name: [(at, v / values[0]) for at, v in enumerate(values, 1)] for name, values in spectra.items()}
    every = [value for points in relative.values() for _, value in points]
    energies = {name: energy_of(values) for name, values in spectra.items()}
    chosen = entries[next(iter(spectra))] if linked and spectra else None
    most = max(4, MOST_POINTS // max(1, len(spectra)))
    return [
        Lines(
            name="spectra",
            title="Singular values, relative to the first",
            about="The root of the sum over all modules of the squares of the i-th singular values.",
            x=counting("index", ranks),
            y=logarithmic("relative singular value", every),
            lines=tuple(Line(name, thinned(points, most), entries[name]) for name, points in relative.items()),
            chosen=chosen,
            says="σ {x} = {y}",
        ),
        Lines(
            name="energy",
            title="Energy: the part of ‖ΔW‖² that a rank keeps",
            about="If every module of the adapter is truncated to the same rank. Broken lines are 90, 95 and 99 %.",
            x=Axis("rank", 0, ranks, counting("", ranks).ticks),
            y=linear("% of ‖ΔW‖²", 0, 100),
            lines=tuple(Line(name, thinned(points, most), entries[name]) for name, points in energies.items()),
            marks=(90, 95, 99),
            chosen=chosen,
            says="rank {x} keeps {y} %",
        ),
    ]


def layer_blocks(report: CompareReport) -> Iterator[Block]:
    """Of a few adapters: a map of each pair, and a table of all layers."""
    layers = Layers(report.modules)
    pairs = [*report.totals][:MOST_MAPS]
    maps = [
        Map(
            f"cosine-{at}",
            f"Cosine of {pair}" if len(pairs) > 1 else "Cosine by layer and module",
            "⟨ΔWᵢ, ΔWⱼ⟩ / (‖ΔWᵢ‖ ‖ΔWⱼ‖) of every layer that both have.",
            of_relation(pair, "cosine", "cosine", ""),
            (-1.0, 1.0),
            "both",
        )
        for at, pair in enumerate(pairs, 1)
    ]
    yield layers.group(maps)
    yield layers.table([measure for pair in pairs for measure in of_pair(pair, len(pairs) == 1)])


PairRelations = Mapping[str, Relation]


def of_pair(pair: str, alone: bool) -> Sequence[Measure[PairRelations]]:
    """The columns of one pair; of several pairs each has fewer, under its name."""
    end = "" if alone else f", {pair}"
    found = [
        of_relation(pair, "cosine", f"cosine{end}", ""),
        of_relation(pair, "overlap_out", f"overlap out{end}", "shared output directions"),
    ]
    if alone:
        found += [
            of_relation(pair, "overlap_in", "overlap in", "shared input directions"),
            of_relation(pair, "norm_ratio", "norms", "‖second‖ / ‖first‖"),
            of_relation(pair, "interference", "interference", "singular task interference"),
            of_relation(pair, "sign_conflict", "signs", "part of entries with opposite signs"),
        ]
    return found


def of_relation(pair: str, field: str, name: str, about: str) -> Measure[PairRelations]:
    def of(found: PairRelations) -> float | None:
        value: float | None = getattr(found[pair], field) if pair in found else None
        return value

    return Measure(name, about, of)


def adapter_table(report: CompareReport, linked: bool) -> Table:
    """A row for each adapter."""
    columns = [
        Column("adapter"),
        Column("‖ΔW‖", "Frobenius norm, all layers together"),
        Column("rank", "largest of its layers, directions that are more than rounding"),
        Column("sum keeps", "part of its ‖ΔW‖² in the directions of the sum of all"),
        Column("alone", "layers that no other adapter has"),
    ]
    rows = [
        (
            name,
            report.norms[name],
            len(report.spectra[name]),
            report.forecast.energy_kept.get(name),
            len(report.alone.get(name, ())),
        )
        for name in report.adapters
    ]
    return Table(plural(len(rows), "adapter"), columns, rows, linked=linked)


def facts(report: CompareReport) -> Iterator[tuple[str, object]]:
    found = report.forecast
    rank = "the adapters' largest rank" if found.rank is None else f"rank {found.rank}"
    yield "sum", f"at {rank} would keep {kept(found.sum_kept)} of its own energy"
    yield "interference", f"{number(found.interference)} for all together (0: no direction is shared)"
    for name, targets in report.alone.items():
        more = f" and {len(targets) - MOST_ALONE} more" if len(targets) > MOST_ALONE else ""
        yield "alone", f"{name}: {', '.join(targets[:MOST_ALONE])}{more}"
    yield from cost_rows(report.cost)
    yield from (("note", note) for note in report.notes)
