"""What the threads of an engine do: jobs with their output files, and tasks, grouped by the bytes that they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from loratool.adapters.adapter import same_bytes
from loratool.files.digests import Digest, Listed, Tree, chunk_cuts, digest_of_part
from loratool.files.known_digests import KnownDigests
from loratool.files.open_sources import OpenSources
from loratool.files.seen_digests import SeenDigests
from loratool.files.sink import Arrived
from loratool.grouping import by_key
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.resources import MOST_SHELVED
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import Effect, Totals

if TYPE_CHECKING:
    from loratool.adapters.adapter import StoredTensor
    from loratool.files.safefile import SafeFile
    from loratool.files.sink import Destination, Sink
    from loratool.merging.output_layout import ShardPlan, Span
    from loratool.merging.plan import MergePlan

RUN = 64 << 20  # bytes of small tensors that one worker copies


@dataclass(eq=False)
class Job:
    """One plan on its way to one destination. A failure stops its own work, and that of no other job."""

    plan: MergePlan
    destination: Destination
    known: KnownDigests | None = None  # digests of tensors that need no hashing
    seen: SeenDigests | None = None  # is told what is read of the base
    apart: bool = False  # whether what is seen of each output is kept apart
    stop: threading.Event = field(default_factory=threading.Event)  # set when its work is to end early
    shared: SharedUpdates = field(default_factory=lambda: SharedUpdates(MOST_SHELVED))
    outputs: list[Output] = field(default_factory=list)
    failure: Exception | None = None  # the first

    totals: Totals = field(init=False)  # what was seen so far, by an earlier run too
    todo: dict[str, ShardPlan] = field(init=False)  # the files that the destination has not when the work begins

    def __post_init__(self) -> None:
        finished = self.destination.finished
        self.todo = {shard.name: shard for shard in self.plan.shards if shard.name not in finished}
        self.totals = Totals(changed=self.plan.replaces or any(shard.changed for shard in finished.values()))
        for shard in self.plan.shards:
            if shard.name in finished:
                measured = effects_in(shard)
                self.totals.measured |= measured
                self.totals.effective |= measured & {*finished[shard.name].effective}

    def rounds(self) -> Iterator[Sequence[ShardPlan]]:
        """The files to make, in the rounds in which the destination takes them."""
        for names in self.destination.rounds(tuple(self.todo)):
            yield [self.todo[name] for name in names]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error, and stop the job for it; an interrupt is for all jobs."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            self.stop.set()

    def close(self) -> None:
        """Close all files, once no thread is at work on them any more. Some systems remove no file that is open."""
        for output in self.outputs:
            output.sink.close()
            output.sources.close()

    def share_seen(self, other: Job) -> None:
        """Take what another job reads of the same base for read; rows are read once for both."""
        if self.seen is not None and other.seen is not None:
            self.seen.share(other.seen)


@dataclass(eq=False)
class Output:
    """One output file on its way."""

    job: Job
    plan: ShardPlan
    sink: Sink
    sources: OpenSources
    hashed: Arrived  # bytes of tensors whose digests are known
    known: dict[str, Listed] = field(default_factory=dict)  # tensor → what its digests are without hashing it
    chunks: dict[str, list[str]] = field(default_factory=dict)  # tensor → digests of its chunks, once they are made
    totals: Totals = field(init=False)  # what is seen of its bytes

    def __post_init__(self) -> None:
        self.totals = Totals() if self.job.apart else self.job.totals

    @classmethod
    def of(cls, job: Job, plan: ShardPlan) -> Output:
        """A file of a job that nothing was written to so far."""
        sink = job.destination.open(plan.name, plan.layout, job.stop)
        output = cls(job, plan, sink, OpenSources(job.seen), Arrived(job.stop))
        job.outputs.append(output)
        empty = digest_of_part(b"")
        for span in plan.spans:
            output.chunks[span.placed.name] = [empty] * len(chunks_of(span))
            if (listed := known_of(job.known, span)) is not None:
                output.known[span.placed.name] = listed
                output.hashed.add(span.placed.nbytes)
        return output

    def place(self, chunk: Chunk) -> int:
        """The byte of the file at which a chunk begins."""
        return self.plan.layout.data_start + chunk.span.placed.start + chunk.start

    def note_copy(self, chunk: Chunk, digest: str) -> None:
        """Keep the digest of a chunk that has the bytes of a stored tensor."""
        self.note(chunk, digest)
        if self.job.seen is not None:
            tensor = chunk.source
            self.job.seen.note(tensor.file, tensor.file.position(tensor.info) + chunk.start, chunk.size, digest)

    def note(self, chunk: Chunk, digest: str) -> None:
        """Keep the digest of a chunk."""
        self.chunks[chunk.span.placed.name][chunk.number] = digest
        self.hashed.add(chunk.size)

    def digest(self) -> Digest | None:
        """Of the file, or of the part that is made, once the digests of all chunks are there.

        None when the work is being stopped.
        """
        layout, cut = self.plan.layout, self.plan.cut
        if not self.hashed.wait_for(bytes_in(self.plan)):
            return None
        if cut is not None:
            parts = {
                span.placed.name: tuple(
                    self.chunks[span.placed.name][chunk.number] for chunk in chunks_in(self.plan, span)
                )
                for span in self.plan.spans
            }
            return Digest(cut[1] - cut[0], tree=Tree.of_part(layout, self.own_names(parts)))
        every = {name: tuple(digests) for name, digests in self.chunks.items()} | self.known
        return Digest(layout.size, tree=Tree.of(layout, self.own_names(every)))

    def own_names(self, listed: Mapping[str, Listed]) -> dict[str, Listed]:
        """What is listed by the names that tensors have in the plan, by those that they have in the file."""
        return {name[len(self.plan.prefix) :]: each for name, each in listed.items()}


@dataclass(frozen=True)
class Chunk:
    """Bytes of an output tensor that have a digest of their own."""

    span: Span
    number: int
    start: int  # byte of the tensor
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self, step: int, window: int) -> Iterator[list[tuple[int, int]]]:
        """Its rows in blocks of `step` as (first row, rows), those of each next `window` rows together."""
        row = self.span.placed.nbytes // self.span.rows
        last = self.stop // row
        for begin in range(self.start // row, last, window):
            end = min(begin + window, last)
            yield [(first, min(step, end - first)) for first in range(begin, end, step)]

    @property
    def source(self) -> StoredTensor:
        """The tensor that it is a copy of, or is computed from."""
        return self.span.carried or self.span.weight.tensors[0]

    @property
    def origin(self) -> Hashable:
        """What chunks have in common that are made of the same bytes."""
        return id(self.source.file), self.source.info.name, self.span.placed.dtype, self.start, self.stop


Cell = list[tuple[Output, Chunk]]  # chunks that are made of the same bytes


@dataclass(frozen=True)
class Copy:
    """Neighbouring chunks whose bytes are those of a stored tensor."""

    output: Output
    chunks: tuple[Chunk, ...]
    known: bool  # whether they have digests already


@dataclass(frozen=True)
class Compute:
    """A chunk of an edited or converted span."""

    output: Output
    work: EditedSpan
    chunk: Chunk


@dataclass(frozen=True)
class Repack:
    """All chunks of the tensors of a weight that is packed anew; `work` is that of its packed values."""

    output: Output
    work: EditedSpan
    chunks: tuple[Chunk, ...]
    renew: bool  # whether scales may be new, too


Task = Copy | Compute | Repack


def effects_in(shard: ShardPlan) -> set[Effect]:
    """The updates that change something in a file."""
    return {(edit.adapter, edit.target) for span in shard.spans for edit in span.edits}


def chunks_of(span: Span) -> list[Chunk]:
    """The chunks of an output tensor."""
    return [Chunk(span, number, *cut) for number, cut in enumerate(pairwise(chunk_cuts(span.placed)))]


def chunks_in(plan: ShardPlan, span: Span) -> list[Chunk]:
    """Those of them that have bytes, and that are made where only a part of a file is."""
    at, cut = plan.layout.data_start + span.placed.start, plan.cut
    every = (chunk for chunk in chunks_of(span) if chunk.size)
    return [chunk for chunk in every if cut is None or cut[0] <= at + chunk.start < cut[1]]


def known_of(known: KnownDigests | None, span: Span) -> Listed | None:
    """What is known of the digests of an output tensor whose bytes are an input's."""
    if known is None or not span.untouched or not span.placed.nbytes:
        return None
    (tensor,) = span.weight.tensors
    return known.of(tensor.file, tensor.info) if tensor.info.shape == span.placed.shape else None


def bytes_in(plan: ShardPlan) -> int:
    """Bytes of tensors that are made of a file."""
    if plan.cut is None:
        return sum(span.placed.nbytes for span in plan.spans)
    return sum(chunk.size for span in plan.spans for chunk in chunks_in(plan, span))


def tasks_on(outputs: Sequence[Output], ready: Callable[[], bool]) -> Iterator[tuple[Task, ...]]:
    """All tasks of some output files; those on the same bytes of an input come together, for one worker.

    Until it is `ready`, for torch may still be on its way, only what needs no arithmetic comes; then that and the rest come
    in turns, so that processors and disk are busy at the same time.
    """
    spans = ((output, span) for output in outputs for span in output.plan.spans if not span.packed)
    cells = by_key((chunk.origin, (output, chunk)) for output, span in spans for chunk in chunks_in(output.plan, span))
    copied = {key: all(chunk.span.carried for _, chunk in cell) for key, cell in cells.items()}
    others = computed(outputs, [cell for key, cell in cells.items() if not copied[key]])
    for run in runs(cell for key, cell in cells.items() if copied[key]):
        yield tuple(copy_of(column) for column in zip(*run, strict=True))
        if ready() and (other := next(others, None)) is not None:
            yield other
    yield from others


def computed(outputs: Sequence[Output], cells: Iterable[Cell]) -> Iterator[tuple[Task, ...]]:
    """The tasks that need arithmetic."""
    for output in outputs:
        for task in repacks_of(output):
            yield (task,)
    begun: dict[tuple[int, int], EditedSpan] = {}  # by output and span
    for cell in cells:
        yield tuple(copy_of([each]) if each[1].span.carried else compute_of(*each, begun) for each in cell)


def repacks_of(output: Output) -> Iterator[Repack]:
    """The tasks for the weights of an output that are packed anew."""
    for spans in by_key((span.packed, span) for span in output.plan.spans if span.packed).values():
        (values,) = (span for span in spans if span.edits)
        work = EditedSpan(values, output.totals, output.job.shared)
        chunks = tuple(chunk for span in spans for chunk in chunks_in(output.plan, span))
        yield Repack(output, work, chunks, len(spans) == len(values.weight.tensors))


def compare_replaced(span: Span, totals: Totals) -> None:
    """Note whether a tensor that is copied from an adapter changes the base."""
    (tensor,), (edit,) = span.weight.tensors, span.edits
    effect = edit.adapter, edit.target
    totals.measured.add(effect)
    if span.carried is not None and not same_bytes(span.carried, tensor):
        totals.effective.add(effect)
        totals.changed = True


def copy_of(chunks: Sequence[tuple[Output, Chunk]]) -> Copy:
    """The task for neighbouring chunks of one output."""
    output, first = chunks[0]
    return Copy(output, tuple(chunk for _, chunk in chunks), first.span.placed.name in output.known)


def compute_of(output: Output, chunk: Chunk, begun: dict[tuple[int, int], EditedSpan]) -> Compute:
    """The task for a chunk; all chunks of a span share its loaded factors, which go with the last of them."""
    span, job, key = chunk.span, output.job, (id(output), id(chunk.span))
    work = begun.pop(key, None) or EditedSpan(span, output.totals, job.shared, job.plan.rounding)
    if chunk.stop < span.placed.nbytes:
        begun[key] = work
    return Compute(output, work, chunk)


def runs(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Cells in the order of a file, in groups that are next to each other in every output."""
    run: list[Cell] = []
    size = 0
    for cell in cells:
        count = cell[0][1].size
        if run and (size + count > RUN or not is_next(run[-1], cell)):
            yield run
            run, size = [], 0
        run.append(cell)
        size += count
    if run:
        yield run


def is_next(before: Cell, cell: Cell) -> bool:
    """Whether the chunks of a cell follow those of another one, each in the same file, with digests or without alike."""
    return len(before) == len(cell) and all(
        one is other
        and one.place(left) + left.size == other.place(right)
        and (left.span.placed.name in one.known) == (right.span.placed.name in one.known)
        for (one, left), (other, right) in zip(before, cell, strict=True)
    )


def ranges_behind(chunk: Chunk) -> Iterator[tuple[SafeFile, int, int]]:
    """Where the rows lie that a chunk is computed from, as file, start and count; nothing of a weight with other rows."""
    span = chunk.span
    row = span.placed.nbytes // span.rows
    first, last = chunk.start // row, chunk.stop // row
    for tensor in span.weight.tensors:
        if tensor.info.rows == span.rows and tensor.info.nbytes % span.rows == 0:
            stored = tensor.info.nbytes // span.rows
            yield tensor.file, tensor.file.position(tensor.info) + first * stored, (last - first) * stored


def ranges_of(chunks: Iterable[Chunk]) -> Iterator[tuple[SafeFile, int, int]]:
    """Where chunks that are copied lie in input files, as file, start and count; neighbours are one range."""
    file: SafeFile | None = None
    start = stop = 0
    for chunk in chunks:
        tensor = chunk.source
        at = tensor.file.position(tensor.info) + chunk.start
        if file is not None and (tensor.file is not file or at != stop):
            yield file, start, stop - start
            file = None
        if file is None:
            file, start = tensor.file, at
        stop = at + chunk.size
    if file is not None:
        yield file, start, stop - start
