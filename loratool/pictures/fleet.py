"""The page of many adapters: a table that can be sorted, and how they compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loratool.pictures.bars import Bar, Bars
from loratool.pictures.blocks import Block, Column, Facts, Group, Message, Messages, Shown, Table, Tiles, Value
from loratool.pictures.page import Page, last_part
from loratool.results.fleet import OK, FleetFacts, FleetRow, base_cell, several, short_count, target_cell, twins
from loratool.results.sketch import Neighbour
from loratool.results.text import counts, figure, plural
from loratool.shown import size

MOST_BARS = 16  # of one figure; the smallest counts are left out of more
MOST_NORMS = 20  # adapters whose norms are shown as bars
MOST_MESSAGES = 200
MOST_NAMES = 100


def page_of(facts: FleetFacts) -> Page:
    """The page of a table."""
    return Page(last_part(facts.path), "inspect", tuple(blocks(facts)))


def blocks(facts: FleetFacts) -> Iterator[Block]:
    rows = facts.adapters
    bad = [row for row in rows if row.health != OK]
    yield Tiles(
        [
            ("adapters", f"{len(rows):,}"),
            ("size", size(sum(row.bytes for row in rows))),
            ("bases", f"{len({row.base for row in rows if row.base}):,}"),
            ("with problems", f"{len(bad):,}"),
            *([("filtered out", f"{facts.filtered:,}")] if facts.filtered else []),
        ]
    )
    yield table(rows)
    if bad:
        yield problems(bad)
    if figures := [*figures_of(rows)]:
        yield Group("How they compare", "", figures)
    if neighbours := [(row.name, near) for row in rows for near in row.near or ()]:
        yield nearest(neighbours)
    if same := twins(rows):
        yield Facts("The same update", [(f"same{differ}", " = ".join(sorted(names))) for names, differ in same.items()])
    yield Facts("Facts", [("path", facts.path), *left_out(facts)])


def figures_of(rows: Sequence[FleetRow]) -> Iterator[Bars]:
    """Bars of what differs."""
    ranks = counts(max(row.rank) for row in rows if row.rank)
    bases = counts(base_cell(row) if row.base or row.model else "not named" for row in rows)
    if ranks:
        in_order = {f"rank {rank}": ranks[rank] for rank in sorted(ranks, key=int)}
        yield counted("ranks", "Adapters by rank", in_order)
    if len(bases) > 1:
        yield counted("bases", "Adapters by base", bases)
    norms = sorted(((row.norm, row.name) for row in rows if row.norm is not None), reverse=True)
    if len(norms) > 1:
        bars = tuple(Bar(name, (norm,), figure(norm)) for norm, name in norms[:MOST_NORMS])
        more = f" The {MOST_NORMS} largest of {len(norms):,}." if len(norms) > MOST_NORMS else ""
        yield Bars(name="norms", title="‖ΔW‖", about=f"Frobenius norm, all modules together.{more}", bars=bars)


def counted(name: str, title: str, found: Mapping[str, int]) -> Bars:
    """How many adapters have what."""
    kept = sorted(found, key=lambda word: -found[word])[:MOST_BARS]
    bars = tuple(Bar(word, (float(found[word]),), f"{found[word]:,}") for word in found if word in kept)
    about = f"{len(found) - len(kept)} with fewer adapters are left out." if len(found) > len(kept) else ""
    return Bars(name=name, title=title, about=about, bars=bars)


def table(rows: Sequence[FleetRow]) -> Table:
    """All that the text has of an adapter, and its base."""
    norms = any(row.norm is not None for row in rows)
    names = ["name", "health", "base", "rank", "alpha", "scale", "targets", "parameters", "size", "date"]
    columns = [Column(name) for name in (*names, *(["‖ΔW‖"] if norms else []), "dialect")]
    return Table("Adapters", columns, [row_of(row, norms) for row in rows])


def row_of(row: FleetRow, norms: bool) -> tuple[Value, ...]:
    return (
        row.name,
        row.health,
        base_cell(row),
        *(Shown(several(values), max(values)) if values else None for values in (row.rank, row.alpha, row.scale)),
        target_cell(row.targets),
        Shown(short_count(row.parameters), row.parameters),
        Shown(size(row.bytes), row.bytes),
        row.date[:10] or "–",
        *([row.norm] if norms else []),
        "+".join(row.dialect) or "–",
    )


def problems(bad: Sequence[FleetRow]) -> Messages:
    """Why adapters cannot be used."""
    messages = [Message(True, row.health, f"{row.name}: {row.reason}") for row in bad[:MOST_MESSAGES]]
    title = f"{plural(len(bad), 'adapter')} with problems"
    more = f", the first {MOST_MESSAGES}" if len(bad) > MOST_MESSAGES else ""
    return Messages(title + more, messages)


def nearest(neighbours: Sequence[tuple[str, Neighbour]]) -> Table:
    """The adapters of an index that are nearest to each."""
    columns = [
        Column("adapter"),
        Column("near", "an adapter of the index"),
        Column("‖ΔW − ΔW'‖", "estimated from sketches"),
        Column("of the larger ‖ΔW‖", "the distance over the larger of the two norms"),
    ]
    rows = [(name, near.name, near.distance, near.relative) for name, near in neighbours]
    return Table("The nearest in the index", columns, rows)


def left_out(facts: FleetFacts) -> Iterator[tuple[str, object]]:
    yield from (("not an adapter", name) for name in facts.left_out[:MOST_NAMES])
    if len(facts.left_out) > MOST_NAMES:
        yield "not an adapter", f"… and {len(facts.left_out) - MOST_NAMES} more; --json has all"
