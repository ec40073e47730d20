"""Where a module is on a map: its layer across, and what it is in that layer down."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.pictures.blocks import MOST_ROWS
from loratool.pictures.heat_map import Cell
from loratool.results.text import mean_of

LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
MOST_CELLS = 4000  # of a map; of more modules, those that differ in numbers only, such as experts, share one
# Modules of one layer in the order in which they are computed.
ORDER = (
    *(
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "in_proj_weight",
        "q_proj",
        "query",
        "q",
        "k_proj",
        "key",
        "k",
        "v_proj",
    ),
    *("value", "v", "o_proj", "out_proj", "o", "gate_proj", "gate_up_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Places:
    """The places of some modules."""

    rows: tuple[str, ...]  # kinds of modules, without what all of their names have in common
    columns: tuple[str, ...]  # layers
    of: Mapping[str, tuple[int, int]]  # target → row and column; in the order of rows, then of columns

    def cells(
        self,
        values: Mapping[str, float | None],
        entries: Mapping[str, int] | None = None,
        together: Callable[[list[float | None]], float | None] = mean_of,
    ) -> tuple[Cell, ...]:
        """The cells of a map.

        Args:
            values: those of the targets.
            entries: of each target the row of the linked table that it has.
            together: makes one value of those that share a place; their mean, unless something else is given.
        """
        at: dict[tuple[int, int], list[str]] = {}
        for target, place in self.of.items():
            if target in values:
                at.setdefault(place, []).append(target)
        return tuple(self.cell(*place, targets, values, entries or {}, together) for place, targets in at.items())

    def cell(
        self,
        row: int,
        column: int,
        targets: Sequence[str],
        values: Mapping[str, float | None],
        entries: Mapping[str, int],
        together: Callable[[list[float | None]], float | None],
    ) -> Cell:
        """The cell of the targets at one place."""
        if len(targets) > 1:
            label = f"{self.rows[row]} of layer {self.columns[column]}, {len(targets)} together"
            return Cell(row, column, together([values[target] for target in targets]), label)
        entry = entries.get(targets[0])
        known = entry if entry is not None and entry < MOST_ROWS else None
        return Cell(row, column, values[targets[0]], bare(targets[0]), known)

    @property
    def by_layer(self) -> list[str]:
        """The targets layer by layer, as a table lists them."""
        return sorted(self.of, key=lambda target: self.of[target][::-1])


def places_of(targets: Iterable[str]) -> Places:
    """The places of targets: layers in the order of their numbers, those without one last; attention first."""
    found = {target: place_of(target) for target in targets}
    if len(found) > MOST_CELLS:
        found = {target: (layer, LAYER.sub("*", name)) for target, (layer, name) in found.items()}
    layered = {name for layer, name in found.values() if layer is not None}
    start = common([*(layered or {name for _, name in found.values()})])
    kinds = sorted({name for _, name in found.values()}, key=lambda name: (name not in layered, *order_of(name)))
    layers = sorted({layer for layer, _ in found.values()}, key=lambda layer: (layer is None, layer or 0))
    places = {target: (kinds.index(name), layers.index(layer)) for target, (layer, name) in found.items()}
    return Places(
        tuple(name.removeprefix(start) for name in kinds),
        tuple("–" if layer is None else str(layer) for layer in layers),
        dict(sorted(places.items(), key=lambda item: item[1])),
    )


def bare(target: str) -> str:
    """The module of a weight."""
    return target.removesuffix(".weight")


def place_of(target: str) -> tuple[int | None, str]:
    """(layer, name) of a module: the first number of its path, and the path without it."""
    path = bare(target)
    match = LAYER.search(path)
    if match is None:
        return None, path
    return int(match[0]), re.sub(r"\.+", ".", f"{path[: match.start()]}{path[match.end() :]}").strip(".")


def common(names: Sequence[str]) -> str:
    """The first parts of paths that all of them have, with the dot behind."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def order_of(name: str) -> tuple[bool, bool, str, int, str]:
    """Where a module comes among those of its layer: attention first, norms last."""
    parent, _, last = name.rpartition(".")
    rank = ORDER.index(last) if last in ORDER else len(ORDER)
    return ("norm" in last, "att" not in name.lower(), parent, rank, name)
