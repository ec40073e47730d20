"""Many adapters in text: a row for each, with its place in the dendrogram and a cell for every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.errors import escaped
from loratool.results.text import COLUMNS, fill, fitted, mean_of, room_for

BESIDES = (
    30  # columns of a row besides its cells, one each; of more adapters than there are cells, the nearest share a row
)
NUMBERS, NUMBER, LEAST_NAME = 8, 7, 14  # up to this many rows, cells are numbers of so many columns next to a name
Table = Sequence[Sequence[float | None]]
Group = tuple[int, ...]  # adapters of a row
TITLES = {
    "cosine": "cosine",
    "overlap_out": "overlap of outputs",
    "overlap_in": "overlap of inputs",
    "sign_conflict": "sign conflict",
}


@dataclass(frozen=True)
class Matrix:
    """Measures of every two adapters, in the order of the report's `adapters`; None where there is no number."""

    cosine: tuple[tuple[float | None, ...], ...]
    overlap_out: tuple[tuple[float | None, ...], ...]
    overlap_in: tuple[tuple[float | None, ...], ...]
    interference: tuple[tuple[float | None, ...], ...]
    sign_conflict: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Join:
    """Two clusters that become one. Adapters are numbered from 0; the first join makes the next number, and so on."""

    one: int
    other: int
    distance: float  # 1 − cosine, the mean over their pairs
    adapters: int  # in both


def matrix_lines(
    names: Sequence[str], matrix: Matrix, tree: Sequence[Join], energy: Mapping[str, float | None]
) -> list[str]:
    """All rows in the order of the dendrogram."""
    line = room_for(COLUMNS)
    merged = max(0, len(names) - (line - BESIDES))
    clusters, groups = zip(*grouped(len(names), tree, merged), strict=True)
    few = len(groups) <= min(NUMBERS, (line - LEAST_NAME) // NUMBER)
    width = min(30, line // 2) if few else max(7, (line - len(groups) - 8) // 3)
    room = line - width - 2 if few else line - len(groups) - width - 7
    labels = [label(names, group, room) for group in groups]
    starts = [
        f"{name:<{room}} {branch}" for name, branch in zip(labels, branches(clusters, tree, merged, width), strict=True)
    ]
    scale = f"dendrogram of 1 − cosine, 0 to {max(join.distance for join in tree):.3f}"
    if few:
        lines = [scale, *(start.rstrip() for start in starts)]
        for name, title in TITLES.items():
            cells = groups_of(getattr(matrix, name), groups)
            lines += ["", title, *(numbers(row, own) for row, own in zip(cells, labels, strict=True))]
        return lines
    digits = upper_and_lower(groups_of(matrix.cosine, groups), groups_of(matrix.overlap_out, groups))
    shares = [mean_of([energy[names[at]] for at in group]) for group in groups]
    ends = ["   –" if share is None else f"{100 * share:3.0f}%" for share in shares]
    lines = [f"{start} {cells} {end}" for start, cells, end in zip(starts, digits, ends, strict=True)]
    lines.append(
        fill(
            f"{scale}; cosine below the diagonal, overlap of outputs above it, in tenths (· under 0.05, # from 0.95, "
            "- negative); at the end of a row the part of the adapter that the sum of all would keep"
        )
    )
    signs = sorted(v for at, row in enumerate(matrix.sign_conflict) for v in row[:at] if v is not None)
    if signs:
        lines.append(fill(f"sign conflict {signs[0]:.3f} to {signs[-1]:.3f}, median {signs[len(signs) // 2]:.3f}"))
    return lines


def label(names: Sequence[str], group: Group, room: int) -> str:
    """An adapter, or how many there are and one of them, in some columns."""
    start = "" if len(group) == 1 else f"{len(group)}× "
    return start + fitted(escaped(names[group[0]]), room - len(start))


def grouped(count: int, tree: Sequence[Join], merged: int) -> list[tuple[int, Group]]:
    """The rows in the order of the dendrogram, after its first joins: the number of each cluster and its adapters."""
    members: dict[int, list[tuple[int, Group]]] = {at: [(at, (at,))] for at in range(count)}
    for at, join in enumerate(tree):
        together = members.pop(join.one) + members.pop(join.other)
        if at < merged:
            together = [(count + at, tuple(adapter for _, group in together for adapter in group))]
        members[count + at] = together
    (order,) = members.values()
    return order


def groups_of(table: Table, groups: Sequence[Group]) -> list[list[float | None]]:
    """Means over the pairs of each two groups."""
    return [[mean_of([table[a][b] for a in one for b in other]) for other in groups] for one in groups]


def upper_and_lower(below: Table, above: Table) -> list[str]:
    """A character for each cell: one table below the diagonal and another above."""
    size = len(below)
    return [
        "".join("\\" if i == j else digit((below if j < i else above)[i][j]) for j in range(size)) for i in range(size)
    ]


def digit(value: float | None) -> str:
    if value is None:
        return " "
    if value <= -0.05:
        return "-"
    return "·" if value < 0.05 else "#" if value >= 0.95 else str(max(1, min(9, round(10 * value))))


def numbers(row: Sequence[float | None], name: str) -> str:
    cells = "".join("      –" if value is None else f"{value:7.3f}" for value in row)
    return f"{cells}  {fitted(escaped(name), room_for(COLUMNS) - len(cells) - 2)}"


def branches(clusters: Sequence[int], tree: Sequence[Join], merged: int, width: int) -> list[str]:
    """The dendrogram next to rows of clusters: the farther right two are joined, the less alike they are."""
    canvas = [[" "] * width for _ in clusters]
    ends = {cluster: (row, 0) for row, cluster in enumerate(clusters)}
    largest = max((join.distance for join in tree), default=0.0)
    first = len(tree) + 1  # the number of the first join
    for at, join in enumerate(tree[merged:], merged):
        to = round((width - 1) * max(0.0, join.distance) / largest) if largest > 0 else width - 1
        (top, begin), (bottom, other) = sorted((ends.pop(join.one), ends.pop(join.other)))
        canvas[top][begin:to] = [mark if mark != " " else "─" for mark in canvas[top][begin:to]]
        canvas[bottom][other:to] = [mark if mark != " " else "─" for mark in canvas[bottom][other:to]]
        for row in range(top + 1, bottom):
            canvas[row][to] = "│" if canvas[row][to] == " " else "┤" if canvas[row][to] == "┘" else canvas[row][to]
        canvas[top][to] = "┬"
        canvas[bottom][to] = "┘" if canvas[bottom][to] == " " else "┤"
        ends[first + at] = (top, to)
    return ["".join(line) for line in canvas]
