"""What the threads of an engine do: jobs with their output files, and tasks, grouped by the bytes that they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from loratool.adapters.adapter import same_bytes
from loratool.files.digests import Digest, Listed, Tree, digest_of_part
from loratool.files.known_digests import KnownDigests
from loratool.files.open_sources import OpenSources
from loratool.files.seen import together
from loratool.files.seen_digests import SeenDigests
from loratool.files.sink import Arrived, Destination, Sink
from loratool.grouping import by_key
from loratool.merging.chunks import Chunk, bytes_in, chunks_in, chunks_of
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.output_layout import ShardPlan, Span
from loratool.merging.plan import Plan
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import Totals, effects_in

RUN = 64 << 20  # bytes of small tensors that one worker copies


@dataclass(eq=False)
class Job:
    """One plan on its way to one destination. A failure stops its own work, and that of no other job."""

    plan: Plan
    destination: Destination
    known: KnownDigests | None = None  # digests of tensors that need no hashing
    seen: SeenDigests | None = None  # is told what is read of the base
    apart: bool = False  # whether what is seen of each output is kept apart
    stop: threading.Event = field(default_factory=threading.Event)  # set when its work is to end early
    shared: SharedUpdates = field(default_factory=SharedUpdates)
    outputs: list[Output] = field(default_factory=list)
    failure: Exception | None = None  # the first

    totals: Totals = field(init=False)  # what was seen so far, by an earlier run too
    todo: dict[str, ShardPlan] = field(init=False)  # the files that the destination has not when the work begins

    def __post_init__(self) -> None:
        finished = self.destination.finished
        self.todo = {shard.name: shard for shard in self.plan.shards if shard.name not in finished}
        seen = together(shard.seen for shard in finished.values())
        self.totals = Totals(changed=self.plan.replaces or seen.changed, effective={*seen.effective})

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


class Output:
    """One output file on its way, among those of its job."""

    def __init__(self, job: Job, plan: ShardPlan) -> None:
        self.job, self.plan = job, plan
        self.sink: Sink = job.destination.open(plan.name, plan.layout, job.stop)
        job.outputs.append(self)
        self.sources, self.hashed = OpenSources(job.seen), Arrived(job.stop)  # bytes of tensors whose digests are known
        self.totals = Totals() if job.apart else job.totals  # what is seen of its bytes
        # by the names that tensors have in the file: what their digests are without hashing them, and those of their chunks
        self.known: dict[str, Listed] = {}
        self.chunks: dict[str, list[str]] = {}
        empty = digest_of_part(b"")
        for span in plan.spans:
            self.chunks[plan.own_name(span)] = [empty] * len(chunks_of(span))
            if (listed := known_of(job.known, span)) is not None:
                self.known[plan.own_name(span)] = listed
                self.hashed.add(span.placed.nbytes)

    def place(self, chunk: Chunk) -> int:
        """The byte of the file at which a chunk begins."""
        return self.plan.place(chunk.span, chunk.start)

    def knows(self, chunk: Chunk) -> bool:
        """Whether a chunk needs no hashing."""
        return self.plan.own_name(chunk.span) in self.known

    def note_copy(self, chunk: Chunk, digest: str) -> None:
        """Keep the digest of a chunk that has the bytes of a stored tensor."""
        self.note(chunk, digest)
        if self.job.seen is not None:
            self.job.seen.note(chunk.source.file, chunk.source_start, chunk.size, digest)

    def note(self, chunk: Chunk, digest: str) -> None:
        """Keep the digest of a chunk."""
        self.chunks[self.plan.own_name(chunk.span)][chunk.number] = digest
        self.hashed.add(chunk.size)

    def digest(self) -> Digest | None:
        """Of the file, or of the part that is made, once the digests of all chunks are there.

        None when the work is being stopped.
        """
        plan, layout = self.plan, self.plan.layout
        if not self.hashed.wait_for(bytes_in(plan)):
            return None
        if plan.cut is None:
            every = {name: tuple(digests) for name, digests in self.chunks.items()}
            return Digest(layout.size, tree=Tree.of(layout, every | self.known))
        made = {plan.own_name(span): [chunk.number for chunk in chunks_in(plan, span)] for span in plan.spans}
        parts = {name: tuple(self.chunks[name][number] for number in numbers) for name, numbers in made.items()}
        return Digest(plan.cut[1] - plan.cut[0], tree=Tree.of_part(layout, parts))


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


def known_of(known: KnownDigests | None, span: Span) -> Listed | None:
    """What is known of the digests of an output tensor whose bytes are an input's."""
    if known is None or not span.untouched or not span.placed.nbytes:
        return None
    (tensor,) = span.weight.tensors
    return known.of(tensor.file, tensor.info) if tensor.info.shape == span.placed.shape else None


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
    yield from ((task,) for output in outputs for task in repacks_of(output))
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
    (tensor,) = span.weight.tensors
    if span.carried is not None and not same_bytes(span.carried, tensor):
        totals.effective |= effects_in([span])
        totals.changed = True


def copy_of(chunks: Sequence[tuple[Output, Chunk]]) -> Copy:
    """The task for neighbouring chunks of one output."""
    output, first = chunks[0]
    return Copy(output, tuple(chunk for _, chunk in chunks), output.knows(first))


def compute_of(output: Output, chunk: Chunk, begun: dict[tuple[int, int], EditedSpan]) -> Compute:
    """The task for a chunk; all chunks of a span share its loaded factors, which go with the last of them."""
    span, job, key = chunk.span, output.job, (id(output), id(chunk.span))
    work = begun.pop(key, None) or EditedSpan(span, output.totals, job.shared)
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
        one is other and one.place(left) + left.size == other.place(right) and one.knows(left) == one.knows(right)
        for (one, left), (other, right) in zip(before, cell, strict=True)
    )
