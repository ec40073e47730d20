"""Carry the bytes of plans to their destinations: a stream of tasks, worked off by threads.

A task is a chunk of a tensor, the unit of its digest, or a run of small ones. One worker brings its bytes one after the
other: reads them, edits them in blocks of rows through `row_blocks`, hashes and writes them. Tasks wait for nobody.
Memory is workers × block, whatever the size of a tensor or a file. Behind the workers each output file has a thread
that sees it to its end. Several plans for one base are worked off together: a worker that has read some rows makes
them for each output.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING

from loratool.arguments import Progress
from loratool.devices import Runtime, exact_arithmetic, load_linear_algebra, resident_memory
from loratool.files import stopwatch
from loratool.files.crew import Crew
from loratool.files.digests import State, new_state
from loratool.files.process import cores, share_heaps
from loratool.files.sink import PAGE, Part, piece_of
from loratool.files.source import expect
from loratool.files.stopwatch import lap
from loratool.grouping import by_key
from loratool.merging.chunks import bytes_in, ranges_behind, ranges_of
from loratool.merging.numpy_worker import NumpyWorker
from loratool.merging.resources import (
    Resources,
    choose_resources,
    factor_memory,
    most_workers,
    read_ahead,
    rows_of_block,
    sums_products,
)
from loratool.merging.tasks import (
    Compute,
    Copy,
    Job,
    Output,
    Repack,
    Task,
    compare_replaced,
    tasks_on,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.merging.output_layout import ShardPlan
    from loratool.merging.row_blocks import Worker

MOST_LANES = 4  # output files of a job that are written at the same time
PATIENCE = 0.8  # seconds that threads have to end
FINISHING_SHARDS = 2  # output files of a job besides that are being synced


class Engine:
    """Runs jobs whose plans have one base. Its threads share a stream of tasks; a job that fails stops only itself."""

    def __init__(
        self,
        jobs: Sequence[Job],
        runtime: Future[Runtime],
        workers: int | None,
        max_memory: int | None,
        progress: Progress | None,
        sent: int = 0,  # bytes that a worker may hold of what it sends elsewhere
    ) -> None:
        self.jobs, self.runtime, self.sent = jobs, runtime, sent
        self.workers, self.max_memory, self.progress = workers, max_memory, progress
        self.spans = [span for job in jobs for span in job.plan.spans]
        self.bytes_all = sum(bytes_in(shard) for job in jobs for shard in job.plan.shards)
        self.counted = max_memory is not None and sent + read_ahead(self.spans) > 0  # the memory of those who copy, too
        self.bytes_done = 0
        self.gpu_memory = 0  # bytes
        self.lanes = max(1, min(MOST_LANES, cores() // 4))
        self.slots = threading.Semaphore((self.lanes + FINISHING_SHARDS) * len(jobs))
        self.taking = threading.Lock()  # of the task stream, and of what is aside
        self.aside: deque[tuple[Task, ...]] = deque()  # for those that may compute
        self.computing = threading.Semaphore(cores())  # numpy's threads: more of them wait for the interpreter's lock
        self.telling = threading.Lock()  # of progress and of finished shards
        self.choosing = threading.Lock()  # of the resources
        self.chosen: Resources | None = None
        self.precision = ExitStack()  # of all arithmetic, from that choice on
        self.crew = Crew(self.stop)
        self.watches: list[stopwatch.Stopwatch] = []  # one a thread

    def run(self) -> None:
        """Make every file that a destination has not; each is finished, and then recorded with what was seen of it.

        Raises what stopped all jobs; what stopped some of them is their `failure`.
        """
        share_heaps()
        todo = [shard for job in self.jobs for shard in job.todo.values()]
        self.tell(self.bytes_all - sum(map(bytes_in, todo)))
        with self.precision:
            for shards in zip_longest(*(job.rounds() for job in self.jobs), fillvalue=()):
                self.make([(job, shard) for job, some in zip(self.jobs, shards, strict=True) for shard in some])
            if self.resources().on_gpu:
                import torch

                self.gpu_memory = sum(torch.cuda.max_memory_reserved(d) for d in self.resources().devices)

    def make(self, shards: Sequence[tuple[Job, ShardPlan]]) -> None:
        """Make some files; all threads have ended when this returns."""
        self.tasks = self.make_tasks([*by_key((shard.name, (job, shard)) for job, shard in shards).values()])
        try:
            for number in range(self.workers or most_workers()):
                self.crew.start(self.work, number)
            self.crew.join()
            if self.crew.failures or all(job.failure for job in self.jobs):
                raise (*self.crew.failures, *(job.failure for job in self.jobs if job.failure))[0]
        except BaseException:
            self.stop()
            if self.crew.has_ended(PATIENCE):  # no thread is at work on any file any more
                for job in self.jobs:
                    job.close()
            raise
        for job in self.jobs:
            if job.failure:
                job.close()

    def resources(self) -> Resources:
        """Decided once torch is there, for only then is it known what memory is left."""
        with self.choosing:
            if self.chosen is None:
                devices, has_torch = self.runtime.result().devices, self.runtime.result().has_torch
                if has_torch:
                    self.precision.enter_context(exact_arithmetic())
                if not all(map(sums_products, self.spans)):
                    load_linear_algebra(devices)
                most = self.workers or most_workers()
                factors = sorted(factor_memory(job.plan.edited, most) for job in self.jobs)
                used = resident_memory() + sum(factors[:-1])  # besides those of the job that needs most
                self.chosen = choose_resources(
                    self.spans, devices, self.workers, self.max_memory, used, self.sent, has_torch
                )
            return self.chosen

    def tell(self, count: int) -> None:
        with self.telling:
            self.bytes_done += count
            if self.progress is not None:
                self.progress(self.bytes_done, self.bytes_all)

    def stop(self) -> None:
        """Ask every thread to end."""
        for job in self.jobs:
            job.stop.set()

    def make_tasks(self, groups: Sequence[Sequence[tuple[Job, ShardPlan]]]) -> Iterator[tuple[Task, ...]]:
        """All tasks, shard by shard, those of all jobs together; on many cores some shards advance side by side.

        While a file has to wait until others are finished there are no tasks, `()`: the others may need what is aside.
        """
        waiting, lanes = iter(groups), deque[Iterator[tuple[Task, ...]]]()
        while True:
            while len(lanes) < self.lanes and (group := next(waiting, None)) is not None:
                outputs: list[Output] = []
                for job, plan in group:
                    while not self.slots.acquire(timeout=0.02):
                        yield ()
                    outputs += self.opened(job, plan)
                lanes.append(tasks_on(outputs, self.runtime.done))
            if not lanes:
                return
            lane = lanes.popleft()
            if (tasks := next(lane, None)) is not None:
                lanes.append(lane)
                yield tasks

    def opened(self, job: Job, plan: ShardPlan) -> list[Output]:
        """An output file of a job, with the thread that sees it to its end; none where the job has been stopped."""
        with job.guarded():
            if not job.stop.is_set():
                output = Output(job, plan)
                self.crew.start(self.finish, output)
                return [output]
        self.slots.release()
        return []

    def take(self, number: int) -> tuple[Task, ...] | None:
        """The next tasks for worker `number`; None when there are none for it.

        More threads can copy than can compute, and how many can is known once torch is there. A thread that comes
        across tasks that are not for it, or not yet, puts them aside for those that may compute.
        """
        while not all(job.stop.is_set() for job in self.jobs):
            with self.taking:
                computes = self.chosen is not None and number < self.chosen.workers
                if self.aside and computes:
                    return self.aside.popleft()
                tasks = next(self.tasks, None)
                if tasks and (computes or not self.takes_memory(tasks)):
                    return tasks
                if tasks:
                    self.aside.append(tasks)
                elif tasks is None and not self.aside:
                    return None
            if tasks != () and number >= self.resources().workers:
                return None
        return None

    def takes_memory(self, tasks: Sequence[Task]) -> bool:
        """Whether only as many threads may do such tasks as `resources` says."""
        return self.counted or not all(isinstance(task, Copy) for task in tasks)

    def work(self, number: int) -> None:
        """A worker's life: take the next tasks until there are none."""
        worker: Worker | NumpyWorker | None = None
        self.watches.append(stopwatch.begin(f"worker {number}"))
        while (tasks := self.take(number)) is not None:
            lap("wait")
            if computed := [task for task in tasks if isinstance(task, Compute)]:
                if worker is None:
                    worker = self.worker(number)
                    lap("start-up")
                self.compute_all(worker, computed)
            digests: list[str] = []  # of the chunks that all copies among the tasks are of
            for task in tasks:
                with task.output.job.guarded():
                    if isinstance(task, Repack):
                        worker = worker or self.worker(number)
                        assert not isinstance(worker, NumpyWorker), "which no weight that is packed anew suits"
                        self.repack(worker, task)
                    elif isinstance(task, Copy) and not task.output.job.stop.is_set():
                        self.copy(task, digests)
        lap("wait")

    def worker(self, number: int) -> Worker | NumpyWorker:
        """The buffers of a thread."""
        if self.runtime.result().has_torch:
            from loratool.merging.row_blocks import Worker

            return Worker.of(self.spans, self.resources(), number)
        return NumpyWorker(self.spans, self.resources(), number, self.computing)

    def copy(self, task: Copy, digests: list[str]) -> None:
        """Carry a run of chunks over as they are. `digests` has those of its chunks, or is empty and takes them."""
        output = task.output
        for chunk in task.chunks:
            if chunk.span.edits and not chunk.number:
                compare_replaced(chunk.span, output.totals)
        part = output.sink.part(output.place(task.chunks[0]), sum(chunk.size for chunk in task.chunks))
        runs = ranges_of(task.chunks)
        for file, start, count in runs:
            expect(output.sources.of(file), start, count)
        if task.known or len(digests) == len(task.chunks):
            for file, start, count in runs:
                part.copy(output.sources.of(file), start, count, None)
                self.tell(count)
            if not output.job.stop.is_set():
                for chunk, digest in () if task.known else zip(task.chunks, digests, strict=True):
                    output.note_copy(chunk, digest)
            return
        digests.clear()  # of one that failed midway
        for chunk in task.chunks:
            state = new_state()

            def look(piece: memoryview, update: Callable[[memoryview], object] = state.update) -> None:
                update(piece)
                lap("digest", len(piece))
                self.tell(len(piece))

            part.copy(output.sources.of(chunk.source.file), chunk.source_start, chunk.size, look)
            if output.job.stop.is_set():
                return
            digests.append(state.hexdigest())
            output.note_copy(chunk, digests[-1])

    def compute_all(self, worker: Worker | NumpyWorker, tasks: Sequence[Compute]) -> None:
        """Make the same chunk for several outputs; rows are read for the largest block, and serve the smaller ones."""
        steps = [rows_of_block(task.chunk.span, self.resources().block) for task in tasks]
        fixed = [step for task, step in zip(tasks, steps, strict=True) if not sums_products(task.chunk.span)]
        one = max(fixed, default=1)  # blocks of formulas must stay as they are, those of sums can be of any size
        window = max(one, max(steps) // one * one)
        largest_first = sorted(zip(steps, tasks, strict=True), key=lambda pair: -pair[0])
        for _ in zip_longest(*(self.compute(worker, task, min(step, window), window) for step, task in largest_first)):
            pass  # the next window of each

    def compute(self, worker: Worker | NumpyWorker, task: Compute, step: int, window: int) -> Iterator[None]:
        """Make the rows of a chunk in blocks of `step` rows, up to `window` rows each time."""
        output, chunk = task.output, task.chunk
        with output.job.guarded():
            at, state = output.place(chunk), new_state()
            part = output.sink.part(at, chunk.size)
            for file, start, count in ranges_behind(chunk):
                expect(output.sources.of(file), start, count)
            for blocks in chunk.blocks(step, window):
                for first, count in blocks:
                    if output.job.stop.is_set():
                        return
                    memory = worker.merged_rows(task.work, first, count, output.sources, at % PAGE)
                    at = self.put(part, at, memory, state)
                yield
            output.note(chunk, state.hexdigest())

    def put(self, part: Part, at: int, memory: memoryview, state: State) -> int:
        """Hash and write what `memory` holds for byte `at` of a file; the byte behind it."""
        piece = piece_of(memory, at)
        state.update(piece)
        lap("digest", len(piece))
        part.put(memory)
        self.tell(len(piece))
        return at + len(piece)

    def repack(self, worker: Worker, task: Repack) -> None:
        """Pack a weight anew, and write all of its tensors."""
        output, most = task.output, self.resources().block
        from loratool.merging.repacking import pack_anew

        made = pack_anew(worker, task.work, output.sources, most, task.renew)
        for chunk in task.chunks:
            if output.job.stop.is_set():
                return
            at, state = output.place(chunk), new_state()
            part = output.sink.part(at, chunk.size)
            data = made[output.plan.own_name(chunk.span)][chunk.start : chunk.stop]
            for piece in data.split(most):  # type: ignore[no-untyped-call]
                at = self.put(part, at, worker.lent(piece, at % PAGE), state)
            output.note(chunk, state.hexdigest())

    def finish(self, output: Output) -> None:
        """See one output file to its end, then tell what was seen of it."""
        self.watches.append(stopwatch.begin("files"))
        try:
            with output.job.guarded():
                self.record(output)
        finally:
            self.slots.release()
        lap("record")

    def record(self, output: Output) -> None:
        """Wait for all bytes of a file and for its digest, and tell what was seen of it."""
        if not output.sink.finish() or (digest := output.digest()) is None:
            return  # stopped; inputs stay open: a worker may still be reading
        output.sources.check_unchanged()
        output.sources.close()
        with self.telling:
            spans = output.plan.spans
            device = "" if all(span.carried for span in spans) else self.resources().kind
            output.sink.record(output.totals.of(spans, device), digest)
