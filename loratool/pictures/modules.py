"""Where a module is on a map: its layer across, and what it is in that layer down."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.grouping import by_key
from loratool.layouts.diffusion.blocks import BASE
from loratool.pictures.blocks import MOST_ROWS
from loratool.pictures.heat_map import Cell
from loratool.results.blocks import block_of, is_of_images, kind_of, place
from loratool.results.text import mean_of
from loratool.templates import common_start

LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
MOST_CELLS = 4000  # of a map; of more modules, those that differ in numbers only, such as experts, share one
# Of names in image models: all up to what a module is called in its block, and the numbers of blocks within a block.
BLOCK = re.compile(r".*(?:blocks?|layers|resnets|attentions|samplers)[._]\d+[._](?:\d+[._](?=[a-z]))?")
INNER = re.compile(r"(?:transformer_blocks|resblocks|layers|block)[._](\d+)[._]")
NO_LAYER = "–"  # the column of modules that are in no layer
AT_END = {"OUT": 1, BASE: 2}  # OUT without a number is what follows all blocks
NUMBERED = ("D", "S", "L")  # kinds of blocks whose own number says all
Key = tuple[Any, ...]  # by which columns are sorted
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
        at = by_key((cell, target) for target, cell in self.of.items() if target in values)
        return tuple(self.cell(*cell, targets, values, entries or {}, together) for cell, targets in at.items())

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
    """The places of targets: layers in the order of their numbers, those without one last; attention first.

    Of image models, blocks are columns, in the order in which the model runs them.
    """
    every = list(targets)
    find = image_place if is_of_images(every) else layer_place
    together = len(every) > MOST_CELLS
    found: dict[str, tuple[Key, str, str]] = {}  # target → key and label of its column, and name of its row
    taken = set[tuple[Key, str]]()
    for target in every:
        key, label, name = find(target)
        if together:
            name = LAYER.sub("*", name)
        elif (key, name) in taken:
            name = bare(target)
        found[target] = key, label, name
        taken.add((key, name))
    names = {name for _, _, name in found.values()}
    layered = {name for _, label, name in found.values() if label not in (NO_LAYER, BASE)}
    start = common_start(layered or names)
    kinds = sorted(names, key=lambda name: (name not in layered, *order_of(name)))
    columns = dict(sorted({(key, label) for key, label, _ in found.values()}))
    row = {name: at for at, name in enumerate(kinds)}
    column = {key: at for at, key in enumerate(columns)}
    places = {target: (row[name], column[key]) for target, (key, _, name) in found.items()}
    return Places(
        tuple(name.removeprefix(start) for name in kinds),
        tuple(columns.values()),
        dict(sorted(places.items(), key=lambda item: item[1])),
    )


def layer_place(target: str) -> tuple[Key, str, str]:
    """The layer of a module, by the first number of its path, and the path without it."""
    path = bare(target)
    match = LAYER.search(path)
    if match is None:
        return (True, 0), NO_LAYER, path
    name = re.sub(r"\.+", ".", f"{path[: match.start()]}{path[match.end() :]}").strip(".")
    return (False, int(match[0])), str(int(match[0])), name


def image_place(target: str) -> tuple[Key, str, str]:
    """The block of a module of an image model, such as IN04.1 for a transformer in a block, and its name there."""
    path, block = bare(target), block_of(target)
    match = BLOCK.match(path)
    inner = INNER.findall(match[0]) if match and kind_of(block) not in NUMBERED else []
    number = int(inner[-1]) if inner else -1
    label = f"{block}.{number}" if inner else block
    return (AT_END.get(block, 0), place(block), number), label, path[match.end() :] if match else path


def bare(target: str) -> str:
    """The module of a weight."""
    return target.removesuffix(".weight")


def order_of(name: str) -> tuple[bool, bool, str, int, str]:
    """Where a module comes among those of its layer: attention first, norms last."""
    parent, _, last = name.rpartition(".")
    rank = ORDER.index(last) if last in ORDER else len(ORDER)
    return ("norm" in last, "att" not in name.lower(), parent, rank, name)
