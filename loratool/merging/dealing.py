"""The parts of a merge, and who does which: decided from the plan alone, alike on every machine.

Parts do not depend on how many workers there are, so that work can go on with another number of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest

from loratool.files.part_records import FilePart
from loratool.grouping import by_key
from loratool.merging.chunks import Chunk, chunks_of
from loratool.merging.output_layout import ShardPlan, Span
from loratool.merging.plan import Plan
from loratool.merging.resources import itemsize_of, sums_products
from loratool.options import sharing
from loratool.options.sharing import Share

SMALLEST = 16 << 20  # bytes of a part: of outputs that would else be fewer parts than `FEWEST`
SMALL = 256 << 20  # bytes of a part of any larger output
LARGE = 1 << 30  # bytes that a part has at most, where it need not stay in one
FEWEST = 64  # parts of a large enough output
# How long a byte takes, by kind of work, where a byte that is copied takes 1
COSTS = {"copy": 1.0, "convert": 1.5, "sum": 2.5, "formula": 16.0, "compensated": 4.5, "repack": 24.0}


def kind_of_work(span: Span) -> str:
    """What has to be done for the bytes of an output tensor; a key of `COSTS`."""
    if span.carried is not None:
        return "copy"
    if span.packed:
        return "repack"
    if not span.edits:
        return "convert"
    if not sums_products(span):
        return "formula"
    return "compensated" if is_compensated(span) else "sum"


def is_compensated(span: Span) -> bool:
    """Whether what is added to a weight depends on all of its rows."""
    return span.rounding == "compensated" and bool(span.edits) and itemsize_of(span.computed) == 2


def cost(part: FilePart) -> float:
    """How long a part takes, against a byte that is copied."""
    return sum(COSTS[kind] * size for kind, size in part.work.items())


def in_order(shard: ShardPlan) -> list[Chunk]:
    """The chunks of an output file in the order of their bytes."""
    return sorted((c for s in shard.spans for c in chunks_of(s) if c.size), key=lambda c: shard.place(c.span, c.start))


def part_of(number: int, shard: ShardPlan, start: int, stop: int, chunks: Iterable[Chunk]) -> FilePart:
    """Bytes `start` … `stop` of output file `number`, with all chunks that lie in them, in their order."""
    work: Counter[str] = Counter()
    own: list[tuple[str, int, int]] = []
    for chunk in chunks:
        work[kind_of_work(chunk.span)] += chunk.size
        own.append((shard.own_name(chunk.span), shard.place(chunk.span, chunk.start), chunk.size))
    return FilePart(f"part-{number:05d}-{start:015d}", shard.name, start, stop, tuple(own), dict(work))


def parts_of(plan: Plan) -> tuple[FilePart, ...]:
    """The parts of all weight files, in the order of files and bytes."""
    size = part_size(sum(shard.layout.size for shard in plan.shards))
    return tuple(part for number, shard in enumerate(plan.shards) for part in cut(number, shard, size))


def part_size(total: int) -> int:
    """Bytes that a part of an output of so many should have at least."""
    return min(SMALL, max(SMALLEST, total // FEWEST))


def cut(number: int, shard: ShardPlan, least: int) -> Iterator[FilePart]:
    """The parts of output file `number`, of `least` bytes and up to `LARGE`, but the last.

    One ends early where copies begin or end, unless it is less than half of that. Chunks that have to be made together
    are in one part, however large it becomes.
    """
    chunks = in_order(shard)
    copies, tied = [chunk.span.carried is not None for chunk in chunks], tied_chunks(chunks)
    firsts, size = [0], 0
    for at in range(1, len(chunks)):
        size += chunks[at - 1].size
        turns = copies[at] != copies[at - 1]
        full = size >= least or size + chunks[at].size > LARGE or (turns and 2 * size >= least)
        if full and at not in tied:
            firsts.append(at)
            size = 0
    edges = [0, *(shard.place(chunks[at].span, chunks[at].start) for at in firsts[1:]), shard.layout.size]
    for (first, last), (start, stop) in zip(pairwise([*firsts, len(chunks)]), pairwise(edges), strict=True):
        yield part_of(number, shard, start, stop, chunks[first:last])


def tied_chunks(chunks: Sequence[Chunk]) -> set[int]:
    """The numbers of chunks that must be in one part with the chunk before them.

    Those are all chunks from the first to the last of a weight that is made as a whole.
    """
    groups: dict[str, list[int]] = {}
    for number, chunk in enumerate(chunks):
        if chunk.span.packed:
            groups.setdefault(f"packed {chunk.span.packed}", []).append(number)
        elif is_compensated(chunk.span):
            groups.setdefault(f"whole {chunk.span.placed.name}", []).append(number)
    return {number for group in groups.values() for number in range(group[0] + 1, group[-1] + 1)}


def deal(parts: Sequence[FilePart], count: int) -> list[list[FilePart]]:
    """The parts of each of `count` workers, so that all of them take about as long."""
    return [[parts[number] for number in share] for share in sharing.deal([cost(part) for part in parts], count)]


def share_of(parts: Sequence[FilePart], share: Share) -> list[FilePart]:
    """What one worker does."""
    return deal(parts, share.count)[share.index - 1]


def across_files(parts: Sequence[FilePart]) -> list[FilePart]:
    """The same parts, those of each file in their order, with neighbours in different files as far as possible.

    Parts are made some at a time, and a kernel lets one writer into a file at a time.
    """
    files = by_key((part.file, part) for part in parts).values()
    return [part for some in zip_longest(*files) for part in some if part is not None]


def plan_of(plan: Plan, parts: Sequence[FilePart]) -> Plan:
    """The plan of some parts alone: each is a file of it, under its own name."""
    shards = {shard.name: shard for shard in plan.shards}
    return dataclasses.replace(plan, shards=tuple(shard_of(shards[part.file], part) for part in parts))


def shard_of(shard: ShardPlan, part: FilePart) -> ShardPlan:
    """A part as a file of a plan, with the tensors that have bytes in it."""
    names = {tensor for tensor, _, _ in part.chunks}
    spans = tuple(span for span in shard.spans if shard.own_name(span) in names and span.placed.nbytes)
    return dataclasses.replace(shard, name=part.name, spans=spans, cut=(part.start, part.stop))
