"""Carry a plan's bytes to a destination: a stream of tasks, worked off by threads.

Untouched spans pass in pieces as they are, edited ones through `row_blocks` as blocks of rows, all
of them in file order. Memory is workers × block, whatever the size of a tensor or a file. Behind
the workers each output file has a thread that sees it to its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

from loratool.devices import Runtime, exact_arithmetic, resident_memory
from loratool.files.journal import Seen
from loratool.files.open_sources import OpenSources
from loratool.files.process import cores
from loratool.files.sink import PAGE
from loratool.merging.resources import (
    COPY_CHUNK,
    MOST_SHELVED,
    Resources,
    choose_resources,
    itemsize,
    most_workers,
    rows_of_block,
)
from loratool.merging.row_blocks import EditedSpan, Effect, Shelf, Totals, Worker

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.files.safefile import SafeFile
    from loratool.files.sink import Destination, Sink
    from loratool.merging.output_layout import ShardPlan, Span
    from loratool.merging.plan import MergePlan

MOST_LANES = 4  # output files that are written at the same time
FINISHING_SHARDS = 2  # output files besides that are being synced


@dataclass(frozen=True)
class Output:
    """One output file on its way."""

    plan: ShardPlan
    sink: Sink
    sources: OpenSources


@dataclass(frozen=True)
class Copy:
    """Bytes that no edit touches."""

    output: Output
    file: SafeFile
    start: int  # in the source file
    target: int  # in the output file
    count: int


@dataclass(frozen=True)
class Block:
    """Rows of an edited or converted span."""

    output: Output
    work: EditedSpan
    first: int
    count: int


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
    ) -> None:
        self.plan, self.destination, self.runtime = plan, destination, runtime
        self.workers, self.max_memory, self.progress = workers, max_memory, progress
        self.totals = Totals(changed=plan.replaces or any(shard.changed for shard in destination.finished.values()))
        for shard in plan.shards:
            if shard.name in destination.finished:
                measured = effects_in(shard)
                self.totals.measured |= measured
                self.totals.effective |= measured & {*destination.finished[shard.name].effective}
        self.shelf = Shelf(MOST_SHELVED)
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

    def make_tasks(self, shards: Sequence[ShardPlan]) -> Iterator[Copy | Block]:
        """All tasks, in file order within a shard; on many cores some shards advance side by side.

        One file is hashed by one worker at a time, which bounds its speed.
        """
        waiting, lanes = iter(shards), deque[Iterator[Copy | Block]]()
        while True:
            while len(lanes) < self.lanes and (plan := next(waiting, None)) is not None:
                lanes.append(self.tasks_of(plan))
            if not lanes:
                return
            lane = lanes.popleft()
            if (task := next(lane, None)) is not None:
                lanes.append(lane)
                yield task

    def tasks_of(self, plan: ShardPlan) -> Iterator[Copy | Block]:
        """One shard's tasks in the file's order, which sinks may count on."""
        while not self.slots.acquire(timeout=0.1):
            if self.stop.is_set():
                return
        output = Output(plan, self.destination.open(plan.name, plan.layout, self.stop), OpenSources())
        self.outputs.append(output)
        self.start(self.finish, output)
        for untouched, spans in groupby(plan.spans, lambda span: span.untouched):
            if untouched:
                yield from copies(output, spans)
                continue
            for span in spans:
                work = EditedSpan(span, self.totals, self.shelf)
                step = rows_of_block(span, self.resources().block)
                for first in range(0, span.rows if span.placed.nbytes else 0, step):
                    yield Block(output, work, first, min(step, span.rows - first))

    def take(self, number: int) -> Copy | Block | None:
        """The next task for worker `number`; None when there is none for it."""
        with self.taking:
            task = next(self.tasks, None)
            if isinstance(task, Block) and number >= self.resources().workers:
                self.tasks = chain([task], self.tasks)  # more threads can copy than can compute
                return None
            return task

    def work(self, number: int) -> None:
        """A worker's life: take the next task until there are none."""
        worker: Worker | None = None
        while not self.stop.is_set() and (task := self.take(number)) is not None:
            if isinstance(task, Copy):
                count = task.count
                task.output.sink.copy(task.output.sources.of(task.file), task.start, count, task.target)
            else:
                worker = worker or self.make_worker(number)
                count = self.carry(worker, task)
            self.tell(count)

    def make_worker(self, number: int) -> Worker:
        resources = self.resources()
        touched = [span for span in self.plan.spans if not span.untouched]
        elements = max(rows_of_block(s, resources.block) * s.width for s in touched)
        raw = max(rows_of_block(s, resources.block) * s.width * itemsize(s) for s in touched)
        wide = any(s.weight.exact == "F64" for s in touched)
        return Worker(resources.devices[number % len(resources.devices)], raw, elements, wide)

    def carry(self, worker: Worker, task: Block) -> int:
        span, output = task.work.span, task.output
        row = span.placed.nbytes // span.rows
        position = output.plan.layout.data_start + span.placed.start + task.first * row
        memory = worker.merged_rows(task.work, task.first, task.count, output.sources, position % PAGE)
        output.sink.put(memory, position)
        return task.count * row

    def finish(self, output: Output) -> None:
        """See one output file to its end, then tell what was seen of it."""
        if not output.sink.finish():
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
                nonfinite=nonfinite,
                effective=sorted(effects_in(output.plan) & self.totals.effective),
            )
            output.sink.record(seen)
        self.slots.release()


def effects_in(shard: ShardPlan) -> set[Effect]:
    """The updates that change something in a file."""
    return {(edit.adapter, edit.target) for span in shard.spans for edit in span.edits}


def copies(output: Output, spans: Iterable[Span]) -> Iterator[Copy]:
    """The bytes of untouched spans, neighbours joined, in pieces."""
    file: SafeFile | None = None
    start = stop = target = 0  # of what is not cut yet; the first two in the source file
    for span in spans:
        (tensor,) = span.weight.tensors
        at = tensor.file.position(tensor.info)
        if tensor.file is not file or at != stop:
            yield from pieces(output, file, start, stop, target)
            file, start, target = tensor.file, at, output.plan.layout.data_start + span.placed.start
        stop = at + tensor.info.nbytes
    yield from pieces(output, file, start, stop, target)


def pieces(output: Output, file: SafeFile | None, start: int, stop: int, target: int) -> Iterator[Copy]:
    for at in range(start, stop, COPY_CHUNK):
        assert file is not None
        yield Copy(output, file, at, target + at - start, min(COPY_CHUNK, stop - at))
