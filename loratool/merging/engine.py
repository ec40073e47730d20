"""Carry a plan's bytes to a destination: a stream of tasks, worked off by threads.

A task is a chunk of a tensor, the unit of its digest, or a run of small ones. One worker brings its bytes one after the
other: reads them, edits them in blocks of rows through `row_blocks`, hashes and writes them. Tasks wait for nobody.
Memory is workers × block, whatever the size of a tensor or a file. Behind the workers each output file has a thread
that sees it to its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING

from loratool.devices import Runtime, exact_arithmetic, resident_memory
from loratool.files import stopwatch
from loratool.files.digests import Digest, Listed, Tree, chunk_cuts, digest_of_part, new_state
from loratool.files.journal import Seen
from loratool.files.known_digests import KnownDigests
from loratool.files.open_sources import OpenSources
from loratool.files.process import cores
from loratool.files.sink import PAGE, Arrived, piece_of
from loratool.files.stopwatch import lap
from loratool.merging.resources import (
    MOST_SHELVED,
    Resources,
    choose_resources,
    most_workers,
    rows_of_block,
)
from loratool.merging.row_blocks import EditedSpan, Worker
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import Effect, Totals

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.files.safefile import SafeFile
    from loratool.files.sink import Destination, Sink
    from loratool.merging.output_layout import ShardPlan, Span
    from loratool.merging.plan import MergePlan

MOST_LANES = 4  # output files that are written at the same time
RUN = 64 << 20  # bytes of small tensors that one worker copies
FINISHING_SHARDS = 2  # output files besides that are being synced


@dataclass(frozen=True)
class Output:
    """One output file on its way."""

    plan: ShardPlan
    sink: Sink
    sources: OpenSources
    hashed: Arrived  # bytes of tensors whose digests are known
    known: dict[str, Listed] = field(default_factory=dict)  # tensor → what its digests are without hashing it
    chunks: dict[str, list[str]] = field(default_factory=dict)  # tensor → digests of its chunks, once they are made

    def place(self, chunk: Chunk) -> int:
        """The byte of the file at which a chunk begins."""
        return self.plan.layout.data_start + chunk.span.placed.start + chunk.start

    def note(self, chunk: Chunk, digest: str) -> None:
        """Keep the digest of a chunk."""
        self.chunks[chunk.span.placed.name][chunk.number] = digest
        self.hashed.add(chunk.size)

    def digest(self) -> Digest | None:
        """Of the whole file, once the digests of all chunks are there; None when the work is being stopped."""
        layout = self.plan.layout
        if not self.hashed.wait_for(layout.size - layout.data_start):
            return None
        return Digest(layout.size, tree=Tree.of(layout, {n: tuple(c) for n, c in self.chunks.items()} | self.known))


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


@dataclass(frozen=True)
class Copy:
    """Neighbouring chunks that no edit touches."""

    output: Output
    chunks: tuple[Chunk, ...]
    known: bool  # whether they have digests already


@dataclass(frozen=True)
class Compute:
    """A chunk of an edited or converted span."""

    output: Output
    work: EditedSpan
    chunk: Chunk


Task = Copy | Compute


class Engine:
    """Runs one plan to one destination. Its threads share a stream of tasks; the first failure stops them all."""

    def __init__(
        self,
        plan: MergePlan,
        destination: Destination,
        runtime: Future[Runtime],
        workers: int | None,
        max_memory: int | None,
        progress: Callable[[int, int], None] | None,
        known: KnownDigests | None = None,
    ) -> None:
        self.known = known  # digests of tensors that need no hashing
        self.plan, self.destination, self.runtime = plan, destination, runtime
        self.workers, self.max_memory, self.progress = workers, max_memory, progress
        self.totals = Totals(changed=plan.replaces or any(shard.changed for shard in destination.finished.values()))
        for shard in plan.shards:
            if shard.name in destination.finished:
                measured = effects_in(shard)
                self.totals.measured |= measured
                self.totals.effective |= measured & {*destination.finished[shard.name].effective}
        self.shared = SharedUpdates(MOST_SHELVED)
        self.bytes_all = sum(span.placed.nbytes for span in plan.spans)
        self.bytes_done = 0
        self.stop = threading.Event()
        self.lanes = max(1, min(MOST_LANES, cores() // 4))
        self.slots = threading.Semaphore(self.lanes + FINISHING_SHARDS)
        self.taking = threading.Lock()  # of the task stream
        self.telling = threading.Lock()  # of progress and of finished shards
        self.choosing = threading.Lock()  # of the resources
        self.chosen: Resources | None = None
        self.precision = ExitStack()  # of all arithmetic, from that choice on
        self.failures: list[BaseException] = []
        self.watches: list[stopwatch.Stopwatch] = []  # one a thread
        self.outputs: list[Output] = []
        self.ends: list[threading.Lock] = []  # one a thread, which holds it for as long as it runs

    def run(self) -> Totals:
        """Make every file that the destination has not; each is finished, and then recorded with what was seen of it."""
        todo = {shard.name: shard for shard in self.plan.shards if shard.name not in self.destination.finished}
        self.tell(self.bytes_all - sum(span.placed.nbytes for shard in todo.values() for span in shard.spans))
        with self.precision:
            for names in self.destination.rounds(tuple(todo)):
                self.make([todo[name] for name in names])
            if self.resources().on_gpu:
                import torch

                self.totals.gpu_memory = sum(torch.cuda.max_memory_reserved(d) for d in self.resources().devices)
        return self.totals

    def make(self, shards: Sequence[ShardPlan]) -> None:
        """Make some files; all threads have ended when this returns."""
        self.tasks = self.make_tasks(shards)
        try:
            for number in range(self.workers or most_workers()):
                self.start(self.work, number)
            self.join()
            if self.failures:
                raise self.failures[0]
        except BaseException:
            self.halt()
            raise

    def resources(self) -> Resources:
        """Decided once torch is there, for only then is it known what memory is left."""
        with self.choosing:
            if self.chosen is None:
                devices = self.runtime.result().devices
                self.precision.enter_context(exact_arithmetic())
                self.chosen = choose_resources(
                    self.plan.spans, devices, self.workers, self.max_memory, resident_memory()
                )
            return self.chosen

    def tell(self, count: int) -> None:
        with self.telling:
            self.bytes_done += count
            if self.progress is not None:
                self.progress(self.bytes_done, self.bytes_all)

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        # Neither Thread.join nor an Event stands an interrupt at every moment of a wait: the first may take a
        # running thread for an ended one (before CPython 3.13), the other may keep its inner lock for ever.
        end = threading.Lock()
        end.acquire()

        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                self.failures.append(error)
                self.stop.set()
            finally:
                end.release()

        self.ends.append(end)
        try:
            threading.Thread(target=guarded, name=f"loratool-{target.__name__}", daemon=True).start()
        except RuntimeError:  # no more threads are to be had
            end.release()
            raise

    def join(self) -> None:
        """Wait for all threads, those too that are started meanwhile; signals come through."""
        at = 0
        while at < len(self.ends):
            if self.ends[at].acquire(timeout=0.1):
                self.ends[at].release()  # for `halt`, which waits for it too
                at += 1

    def halt(self) -> None:
        """Ask every thread to end, and give them a moment; files are closed where none is at work on them any more.

        Some systems remove no file that is open.
        """
        self.stop.set()
        until, ended = time.monotonic() + 0.8, True
        for end in self.ends:  # those too that are started meanwhile
            ended &= end.acquire(timeout=max(0.0, until - time.monotonic()))
        for output in self.outputs if ended else ():
            output.sink.close()
            output.sources.close()

    def make_tasks(self, shards: Sequence[ShardPlan]) -> Iterator[Task]:
        """All tasks, shard by shard; on many cores some shards advance side by side."""
        waiting, lanes = iter(shards), deque[Iterator[Task]]()
        while True:
            while len(lanes) < self.lanes and (plan := next(waiting, None)) is not None:
                lanes.append(self.tasks_of(plan))
            if not lanes:
                return
            lane = lanes.popleft()
            if (task := next(lane, None)) is not None:
                lanes.append(lane)
                yield task

    def tasks_of(self, plan: ShardPlan) -> Iterator[Task]:
        """One shard's tasks: what needs no arithmetic comes first, for torch may still be on its way."""
        while not self.slots.acquire(timeout=0.1):
            if self.stop.is_set():
                return
        sink = self.destination.open(plan.name, plan.layout, self.stop)
        output = Output(plan, sink, OpenSources(), Arrived(self.stop))
        self.outputs.append(output)
        chunks = {id(span): chunks_of(span) for span in plan.spans}
        empty = digest_of_part(b"")
        for span in plan.spans:
            output.chunks[span.placed.name] = [empty] * len(chunks[id(span)])
            if (listed := self.known_of(span)) is not None:
                output.known[span.placed.name] = listed
                output.hashed.add(span.placed.nbytes)
        self.start(self.finish, output)
        untouched = [chunk for span in plan.spans if span.untouched for chunk in chunks[id(span)]]
        for known, group in groupby(untouched, lambda chunk: chunk.span.placed.name in output.known):
            yield from (Copy(output, run, known) for run in runs(group))
        for span in plan.spans:
            if not span.untouched:
                work = EditedSpan(span, self.totals, self.shared, self.plan.rounding)
                yield from (Compute(output, work, chunk) for chunk in chunks[id(span)] if chunk.size)

    def known_of(self, span: Span) -> Listed | None:
        """What is known of the digests of an output tensor whose bytes are an input's."""
        if self.known is None or not span.untouched or not span.placed.nbytes:
            return None
        (tensor,) = span.weight.tensors
        return self.known.of(tensor.file, tensor.info) if tensor.info.shape == span.placed.shape else None

    def take(self, number: int) -> Task | None:
        """The next task for worker `number`; None when there is none for it."""
        with self.taking:
            task = next(self.tasks, None)
        if isinstance(task, Compute) and number >= self.resources().workers:
            with self.taking:
                self.tasks = chain([task], self.tasks)  # more threads can copy than can compute
            return None
        return task

    def work(self, number: int) -> None:
        """A worker's life: take the next task until there are none."""
        worker: Worker | None = None
        self.watches.append(stopwatch.begin(f"worker {number}"))
        while not self.stop.is_set() and (task := self.take(number)) is not None:
            lap("wait")
            if isinstance(task, Copy):
                self.copy(task)
            else:
                if worker is None:
                    worker = Worker.of(self.plan.spans, self.resources(), number)
                    lap("start-up")
                self.compute(worker, task)
        lap("wait")

    def copy(self, task: Copy) -> None:
        """Carry a run of chunks over as they are."""
        output = task.output
        part = output.sink.part(output.place(task.chunks[0]), sum(chunk.size for chunk in task.chunks))
        if task.known:
            for file, start, count in ranges_of(task.chunks):
                part.copy(output.sources.of(file), start, count, None)
                self.tell(count)
            return
        for chunk in task.chunks:
            (tensor,) = chunk.span.weight.tensors
            start, state = tensor.file.position(tensor.info) + chunk.start, new_state()

            def look(piece: memoryview, update: Callable[[memoryview], object] = state.update) -> None:
                update(piece)
                lap("digest", len(piece))
                self.tell(len(piece))

            part.copy(output.sources.of(tensor.file), start, chunk.size, look)
            if self.stop.is_set():
                return
            output.note(chunk, state.hexdigest())

    def compute(self, worker: Worker, task: Compute) -> None:
        """Make the rows of a chunk, block by block."""
        output, chunk, span = task.output, task.chunk, task.chunk.span
        row, step = span.placed.nbytes // span.rows, rows_of_block(span, self.resources().block)
        at, last, state = output.place(chunk), chunk.stop // row, new_state()
        part = output.sink.part(at, chunk.size)
        for first in range(chunk.start // row, last, step):
            if self.stop.is_set():
                return
            count = min(step, last - first)
            memory = worker.merged_rows(task.work, first, count, output.sources, at % PAGE)
            state.update(piece_of(memory, at))
            lap("digest", count * row)
            part.put(memory)
            at += count * row
            self.tell(count * row)
        output.note(chunk, state.hexdigest())

    def finish(self, output: Output) -> None:
        """See one output file to its end, then tell what was seen of it."""
        self.watches.append(stopwatch.begin("files"))
        if not output.sink.finish() or (digest := output.digest()) is None:
            return  # stopped; inputs stay open: a worker may still be reading
        output.sources.check_unchanged()
        output.sources.close()
        with self.telling:
            spans = output.plan.spans
            device = "" if all(span.untouched for span in spans) else self.resources().kind
            names = [span.placed.name for span in spans]
            nonfinite = {name: self.totals.nonfinite[name] for name in names if name in self.totals.nonfinite}
            seen = Seen(
                changed=self.totals.changed,
                device=device,
                ratios=self.totals.ratios(names),
                kept=self.totals.kept_in(names),
                nonfinite=nonfinite,
                effective=sorted(effects_in(output.plan) & self.totals.effective),
            )
            output.sink.record(seen, digest)
        self.slots.release()
        lap("record")


def effects_in(shard: ShardPlan) -> set[Effect]:
    """The updates that change something in a file."""
    return {(edit.adapter, edit.target) for span in shard.spans for edit in span.edits}


def chunks_of(span: Span) -> list[Chunk]:
    """The chunks of an output tensor."""
    return [Chunk(span, number, *cut) for number, cut in enumerate(pairwise(chunk_cuts(span.placed)))]


def ranges_of(chunks: Iterable[Chunk]) -> Iterator[tuple[SafeFile, int, int]]:
    """Where untouched chunks lie in input files, as file, start and count; neighbours are one range."""
    file: SafeFile | None = None
    start = stop = 0
    for chunk in chunks:
        (tensor,) = chunk.span.weight.tensors
        at = tensor.file.position(tensor.info) + chunk.start
        if file is not None and (tensor.file is not file or at != stop):
            yield file, start, stop - start
            file = None
        if file is None:
            file, start = tensor.file, at
        stop = at + chunk.size
    if file is not None:
        yield file, start, stop - start


def runs(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ...]]:
    """Chunks in the order of a file, in groups that are next to each other in it."""
    run: list[Chunk] = []
    size = end = 0
    for chunk in chunks:
        if not chunk.size:
            continue
        start = chunk.span.placed.start + chunk.start
        if run and (start != end or size + chunk.size > RUN):
            yield tuple(run)
            run, size = [], 0
        run.append(chunk)
        size, end = size + chunk.size, start + chunk.size
    if run:
        yield tuple(run)
