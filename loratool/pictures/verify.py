"""The page of a verification: the verdict, what every tensor is, and how far it is from the formula."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from loratool.errors import printable
from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Column, Facts, Group, Message, Messages, Table, Tiles
from loratool.pictures.heat_map import HeatMap
from loratool.pictures.layers import Layers
from loratool.pictures.modules import bare
from loratool.pictures.page import Page
from loratool.results.text import figure, memory, plural, row_if
from loratool.results.verify import TensorProof, Verification
from loratool.shown import size

STATES = (  # of a tensor, and the class of its colour
    ("identical", "quiet"),
    ("proven", "s2"),
    ("rounded-twice", "s1"),
    ("unknown", "s5"),
    ("missing", "s3"),
    ("different", "bad"),
)
DISTANCES = (0.0, 0.5, 1.0, 2.0, 8.0, 64.0)  # in ulp: ends of the bars


def page_of(result: Verification) -> Page:
    """The page of one merged model."""
    return Page(
        os.path.basename(os.path.realpath(result.merged)) or str(result.merged), "verify", tuple(blocks_of(result))
    )


def blocks_of(result: Verification) -> Iterator[Block]:
    yield Tiles(tiles_of(result))
    yield found(result)
    if result.tensors:
        yield from tensor_blocks(result.tensors, result.adapters)
    yield Facts(
        "Facts",
        [
            ("merged", printable(result.merged)),
            ("verdict", result.sentence),
            *row_if(result.base, "formula", " + ".join(map(printable, (result.base, *result.adapters)))),
            *row_if(result.rounding, "rounding", result.rounding),
            *row_if(result.files, "files", f"{result.files} compared with loratool.json"),
            *row_if(result.cost.device, "device", result.cost.device),
            *row_if(result.cost.peak_memory, "peak memory", memory(result.cost.peak_memory)),
        ],
    )


def tiles_of(result: Verification) -> list[tuple[str, str]]:
    """The verdict, and the numbers that it is made of."""
    distances = [proof.ulp for proof in (result.tensors or {}).values() if proof.ulp is not None]
    return [
        ("verdict", result.verdict.replace("-", " ")),
        *((status.replace("-", " "), f"{count:,}") for status, count in result.counts.items()),
        *([("largest distance", f"{figure(max(distances), 4)} ulp")] if distances else []),
        *([("files as recorded", f"{result.files:,}")] if result.files else []),
        *([("read", size(result.bytes_read))] if result.bytes_read else []),
    ]


def found(result: Verification) -> Messages:
    """The verdict in words, and what explains it."""
    messages = [Message(not each.passes, each.code, each.text) for each in result.diagnoses]
    messages += [Message(note.is_warning, note.code, note.text) for note in result.notes]
    return Messages(f"{result.sentence[0].upper()}{result.sentence[1:]}", messages)


def tensor_blocks(tensors: Mapping[str, TensorProof], adapters: Sequence[str]) -> Iterator[Block]:
    """Maps, distances and the table of all tensors."""
    layers = Layers(tensors)
    states = [state for state in STATES if any(proof.status == state[0] for proof in tensors.values())]
    numbers = {name: float(at) for at, (name, _) in enumerate(states)}
    states_map = HeatMap(
        name="states",
        title="Status of every tensor",
        about="Identical to the base, proven, or neither.",
        rows=layers.places.rows,
        columns=layers.places.columns,
        cells=layers.places.cells({n: numbers[proof.status] for n, proof in tensors.items()}, layers.entries, worst),
        states=tuple(states),
        what="status",
    )
    yield Group("Tensors", "", [states_map])
    distances = [proof.ulp for proof in tensors.values() if proof.ulp is not None]
    if distances:
        yield Group("Distance from the formula", "", [distance_bars(distances)])
    yield tensor_table(layers.layers, adapters)


def worst(states: Sequence[float | None]) -> float | None:
    """The state to worry about most of several."""
    return max(state for state in states if state is not None)


def distance_bars(distances: Sequence[float]) -> Bars:
    """How many tensors are how far from the formula."""
    bars = []
    for low, high in zip((None, *DISTANCES), (*DISTANCES, None), strict=True):
        count = sum((low is None or each > low) and (high is None or each <= high) for each in distances)
        name = "exactly" if low is None else f"above {low:g}" if high is None else f"up to {high:g}"
        bars.append(Bar(name, (float(count),), f"{count:,}", "s2" if high is not None and high <= 2 else "bad"))
    return Bars(
        name="distances",
        title="Distance from the formula",
        about="Tensors by the largest distance of an element from the formula, in ulp at the size of the operands; "
        "identical tensors count as exact.",
        bars=tuple(bars),
    )


def tensor_table(tensors: Mapping[str, TensorProof], adapters: Sequence[str]) -> Table:
    """Every tensor with what was found."""
    columns = [
        Column("tensor"),
        Column("status"),
        Column("ulp", "largest distance from the formula, in ulp at the size of the operands"),
        Column("equal", "fraction of the elements that are the formula's, bit for bit"),
        *(Column(f"factor of {name}", "how much of this adapter's update is in it") for name in adapters),
    ]
    blank = (None,) * len(adapters)
    rows = [(bare(n), p.status, p.ulp, p.equal, *(p.factor or blank)) for n, p in tensors.items()]
    return Table(plural(len(rows), "tensor"), columns, rows, linked=True)
