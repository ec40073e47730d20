"""Where a module is on a map: its layer across, and what it is in that layer down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.pictures.heat_map import Cell

LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
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

    def cells(self, values: Mapping[str, float | None], entries: Mapping[str, int] | None = None) -> tuple[Cell, ...]:
        """The cells of a map: of each target its value, and the row of the linked table that it has."""
        return tuple(
            Cell(row, column, values[target], bare(target), entries[target] if entries else None)
            for target, (row, column) in self.of.items()
            if target in values
        )

    @property
    def by_layer(self) -> list[str]:
        """The targets layer by layer, as a table lists them."""
        return sorted(self.of, key=lambda target: self.of[target][::-1])


def places_of(targets: Iterable[str]) -> Places:
    """The places of targets: layers in the order of their numbers, those without one last; attention first."""
    found = {target: place_of(target) for target in targets}
    start = common([name for _, name in found.values()])
    kinds = sorted({name for _, name in found.values()}, key=order_of)
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


def order_of(name: str) -> tuple[bool, str, int, str]:
    """Where a module comes among those of its layer: attention first."""
    parent, _, last = name.rpartition(".")
    rank = ORDER.index(last) if last in ORDER else len(ORDER)
    return ("att" not in name.lower(), parent, rank, name)
