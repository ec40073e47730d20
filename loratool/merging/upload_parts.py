"""How output files are cut for uploads in parts: decided from the plan and the limits of the store alone.

Ranges that no edit touches, and that lie in the same store, are copied there; all else goes through a worker. Where an
edge between the two would leave a piece that is too small for the store, some neighbouring bytes go through as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.errors import UsageError, printable
from loratool.files.stand_ins import stand_in
from loratool.merging.chunks import Chunk
from loratool.merging.dealing import in_order, part_of, part_size, tied_chunks
from loratool.merging.output_layout import ShardPlan
from loratool.merging.plan import Plan
from loratool.stores.limits import Limits
from loratool.stores.objects import StoredObject
from loratool.stores.upload_part import Fringe, UploadPart

Find = Callable[[Path], object]  # tells the object that a file stands for
MOST = 128 << 20  # bytes after which a part that is sent ends: its pieces may be in memory together


@dataclass(frozen=True)
class Run:
    """Neighbouring bytes of a file that have the same origin: a range of an object, or this machine."""

    start: int
    stop: int
    source: StoredObject | None = None
    source_start: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start

    def follows(self, other: Run) -> bool:
        """Whether it goes on where another one ends, in the file and in the source."""
        if self.source is None or other.source is None:
            return self.source is other.source
        return self.source == other.source and other.source_start + other.size == self.source_start


def upload_parts(plan: Plan, limits: Limits, find: Find = stand_in) -> tuple[UploadPart, ...]:
    """The parts of all weight files, in the order of files and bytes.

    Raises `UsageError` for a file that would take more pieces than the store allows.
    """
    size = min(MOST, part_size(sum(shard.layout.size for shard in plan.shards)))
    found: list[UploadPart] = []
    for number, shard in enumerate(plan.shards):
        piece = limits.piece
        parts = [*cut(number, shard, limits, size, find)]
        while sum(len(part.pieces) for part in parts) > limits.most:
            piece *= 2
            if piece > limits.largest:
                raise UsageError(
                    f"{printable(shard.name)}: would take more than {limits.most} parts of an upload; pass --shard-size "
                    "to write smaller files"
                )
            parts = [*cut(number, shard, replace(limits, piece=piece), size, find)]
        found += parts
    return tuple(found)


def cut(number: int, shard: ShardPlan, limits: Limits, least: int, find: Find) -> Iterator[UploadPart]:
    """The parts of output file `number`; those that are sent have `least` bytes or more, where there are so many."""
    chunks = in_order(shard)
    places = [shard.place(chunk.span, chunk.start) for chunk in chunks]
    origins = [*origins_of(shard, chunks, find if limits.copies else lambda _path: None)]
    tied, first = tied_chunks(chunks), 1
    for run in large_enough(joined(origins), limits.smallest):
        if run.source is not None:
            part = replace(part_of(number, shard, run.start, run.stop, ()), work={"copy": run.size})
            cuts = even(run.start, run.stop, limits.largest)
            yield UploadPart(**vars(part), first=first, cuts=cuts, source=run.source, source_start=run.source_start)
            first += len(cuts) - 1
            continue
        ends = [(shard.place(each.span), shard.place(each.span, each.span.placed.nbytes)) for each in chunks]
        own = [
            at for at, (start, stop) in enumerate(ends) if run.start <= start and stop <= run.stop
        ]  # of whole tensors
        edges = [places[at] for at in own if at not in tied]
        for start, stop in spread(run, edges, run.size if limits.uniform else max(least, limits.smallest), limits):
            part = part_of(number, shard, start, stop, (chunks[at] for at in own if start <= places[at] < stop))
            cuts = steps(start, stop, limits) if limits.uniform else even(start, stop, limits.piece)
            fringes = tuple(fringes_of(origins, part.chunks, start, stop))
            yield UploadPart(**vars(part), first=first, cuts=cuts, fringes=fringes)
            first += len(cuts) - 1


def origins_of(shard: ShardPlan, chunks: Sequence[Chunk], find: Find) -> Iterator[Run]:
    """Where the bytes of a file are from, from its first to its last one."""
    at = shard.layout.data_start
    yield Run(0, at, *header_in(chunks, shard, find))
    for chunk in chunks:
        start = shard.place(chunk.span, chunk.start)
        if start > at:
            yield Run(at, start)
        at = start + chunk.size
        there = find(chunk.source.file.path) if chunk.span.carried is not None else None
        yield Run(start, at, there, chunk.source_start) if isinstance(there, StoredObject) else Run(start, at)
    if at < shard.layout.size:
        yield Run(at, shard.layout.size)


def header_in(chunks: Sequence[Chunk], shard: ShardPlan, find: Find) -> tuple[StoredObject, int] | tuple[()]:
    """The object of the base that begins with the header of an output file."""
    for file in {id(chunk.source.file): chunk.source.file for chunk in chunks}.values():
        there = find(file.path)
        if isinstance(there, StoredObject) and file.layout.header == shard.layout.header:
            return there, 0
    return ()


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same with neighbours that follow each other as one."""
    found: list[Run] = []
    for run in runs:
        if found and run.follows(found[-1]):
            found[-1] = replace(found[-1], stop=run.stop)
        elif run.size:
            found.append(run)
    return found


def large_enough(runs: Sequence[Run], smallest: int) -> list[Run]:
    """The same with no run but the last of less than `smallest` bytes; what is too small goes through this machine."""
    runs = joined([run if run.source is None or run.size >= smallest else Run(run.start, run.stop) for run in runs])
    found: list[Run] = []
    for run in runs:
        before = found[-1] if found else None
        if before is None or before.source is not None or before.size >= smallest:
            found.append(run)
            continue
        # bytes of this run, which is a copy, fill up the one before it
        stop = before.start + smallest
        if run.source is None or run.stop - stop < smallest:
            found[-1] = Run(before.start, run.stop)
        else:
            found[-1] = Run(before.start, stop)
            found.append(Run(stop, run.stop, run.source, run.source_start + stop - run.start))
    return joined(found)


def spread(run: Run, edges: Sequence[int], least: int, limits: Limits) -> Iterator[tuple[int, int]]:
    """A run in parts of at least `least` bytes that begin at some of `edges`."""
    start = run.start
    for edge in edges:
        if edge - start >= least and run.stop - edge >= limits.smallest:
            yield start, edge
            start = edge
    yield start, run.stop


def even(start: int, stop: int, most: int) -> tuple[int, ...]:
    """Where the fewest pieces of at most `most` bytes begin, all of about one size, and where the last one ends."""
    count = max(1, -(-(stop - start) // most))
    return tuple(start + (stop - start) * number // count for number in range(count + 1))


def steps(start: int, stop: int, limits: Limits) -> tuple[int, ...]:
    """The same for pieces of exactly one size, but the last."""
    return (*range(start, stop, limits.piece), stop)


def fringes_of(
    origins: Sequence[Run], chunks: Sequence[tuple[str, int, int]], start: int, stop: int
) -> Iterator[Fringe]:
    """What lies between the chunks of a part, and before and behind them."""
    at = start
    for first, size in [*((first, size) for _, first, size in chunks), (stop, 0)]:
        if first > at:
            for run in origins:
                low, high = max(run.start, at), min(run.stop, first)
                if low < high:
                    yield Fringe(low, high - low, run.source, run.source_start + low - run.start if run.source else 0)
        at = first + size
