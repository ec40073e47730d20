"""The page of an estimate: memory of training by what it is for, and the parameters of each rank and target."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Column, Facts, Group, Shown, Table, Tiles, Value
from loratool.pictures.page import Page, last_part
from loratool.results.estimate import Estimate, growth, quantised_line
from loratool.results.text import row_if
from loratool.shown import size


def page_of(result: Estimate) -> Page:
    """The page of one base."""
    return Page(last_part(result.path), "estimate", tuple(blocks_of(result)))


def blocks_of(result: Estimate) -> Iterator[Block]:
    yield Tiles(tiles_of(result))
    yield Group(
        "Memory of training",
        "Weights, gradients and the two moments of AdamW; activations not included.",
        [training(result)],
    )
    yield ranks_table(result)
    if len(result.targets) > 1:
        yield Group("Parameters by target", "", [by_target(result)])
    yield targets_table(result)
    yield Facts(
        "Facts",
        [
            ("base", result.path),
            ("architecture", result.architecture or "unknown"),
            ("parameters", f"{result.parameters:,} in {', '.join(result.dtypes)}, {size(result.bytes)}"),
            *row_if(result.quantisation, "quantised", quantised_line(result)),
            ("merged model", size(result.merged_bytes)),
            ("growth", growth(result)),
            *(("note", note) for note in result.notes),
        ],
    )


def tiles_of(result: Estimate) -> list[tuple[str, str]]:
    """The numbers of the first rank."""
    first = result.ranks[0]
    return [
        ("base", f"{result.parameters:,}"),
        (f"trainable, r = {first.rank}", f"{first.trainable:,}"),
        ("of all parameters", f"{first.percent:.4f} %"),
        (f"adapter, {result.dtype}", size(first.adapter_bytes)),
        ("training with LoRA", size(first.lora.total)),
        ("with QLoRA", size(first.qlora.total)),
    ]


def training(result: Estimate) -> Bars:
    """What every kind of training holds."""
    rows = [
        ("full fine-tuning", result.full),
        *((f"LoRA, r = {each.rank}", each.lora) for each in result.ranks),
        *((f"QLoRA, r = {each.rank}", each.qlora) for each in result.ranks),
    ]
    return Bars(
        name="memory",
        title="Memory of training",
        about="Bytes for weights, gradients and the two moments of AdamW; activations not included.",
        series=("weights", "gradients", "moments of AdamW"),
        bars=tuple(
            Bar(name, (float(each.weights), float(each.gradients), float(each.optimizer)), size(each.total))
            for name, each in rows
        ),
    )


def by_target(result: Estimate) -> Bars:
    """How the parameters of an adapter are spread over the targets."""
    rank = result.ranks[0].rank
    bars = tuple(Bar(t.name, (float(t.per_rank * rank),), f"{t.per_rank * rank:,}") for t in result.targets)
    return Bars(
        name="targets",
        title=f"Parameters by target, r = {rank}",
        about="How many parameters of an adapter belong to the weights of each name.",
        bars=bars,
    )


def ranks_table(result: Estimate) -> Table:
    """A row for each rank."""
    names = ("rank", "trainable", "of all parameters", f"adapter, {result.dtype}", "LoRA", "QLoRA", "full fine-tuning")
    rows: list[tuple[Value, ...]] = [
        (
            f"r = {each.rank}",
            each.trainable,
            Shown(f"{each.percent:.4f} %", each.percent),
            *(shown(count) for count in (each.adapter_bytes, each.lora.total, each.qlora.total, result.full.total)),
        )
        for each in result.ranks
    ]
    return Table("Ranks", [Column(name) for name in names], rows, plain=True)


def shown(count: int) -> Shown:
    return Shown(size(count), count)


def targets_table(result: Estimate) -> Table:
    columns = [
        Column("target"),
        Column("shape", "rows and columns, as the base stores it"),
        Column("weights", "how many there are"),
        Column("parameters per rank", "of all their factors together at rank 1"),
    ]
    rows = [(t.name, "×".join(map(str, t.shape)), t.count, t.per_rank) for t in result.targets]
    return Table("Targets", columns, rows, plain=True)
