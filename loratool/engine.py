"""Carry row blocks past their edits: read, apply, write, on CPU threads or on CUDA streams.

Untouched spans are copied inside the kernel. Edited ones pass as blocks of rows through one
buffer per worker: read ▸ to float32 ▸ every edit ▸ round once ▸ write at the planned offset.
Memory is workers × block, whatever the size of a tensor or a file. Behind the workers each
output file has a thread that hashes it and one that brings it to stable storage.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import load_rows, load_update
from loratool.errors import FitError, UsageError, printable
from loratool.safefile import (
    COPY_CHUNK,
    FLOAT_NAMES,
    SafeFile,
    TensorInfo,
    copy_bytes,
    open_regular,
    read_exactly,
    write_fully,
)
from loratool.staging import FinishedShard, Stage
from loratool.updates import LowRank, Replace, stack

if TYPE_CHECKING:
    import torch

    from loratool.planning import Edit, MergePlan, ShardPlan, Span

CPU_BLOCK = 1 << 20  # bytes of weight: stays in a core's cache
CUDA_BLOCK = 16 << 20  # bytes of weight: hides the latency of a transfer
SMALLEST_BLOCK = 64 << 10
MOST_WORKERS = 16
OPEN_SHARDS = 3  # output files in flight: written, hashed or synced
HASH_CHUNK = 4 << 20
SYNC_CHUNK = 256 << 20  # bytes after which what was written is sent to the disk
RUNTIME_MEMORY = 256 << 20  # bytes: Python, torch and its libraries, before any work
CUDA_MEMORY = 600 << 20  # bytes of host memory that the CUDA libraries take besides
WORKING_MEMORY = 32 << 20  # bytes: hashing, small files and the libraries' own buffers


@dataclass(frozen=True)
class Resources:
    """What a merge may use."""

    devices: tuple[str, ...]  # "cpu", or one or more of "cuda:0", …
    workers: int
    block: int  # bytes of weight that pass at a time, at least one row

    @property
    def on_gpu(self) -> bool:
        return self.devices[0] != "cpu"


@dataclass
class Totals:
    """What was seen while the bytes went by."""

    weight_norm: dict[str, float] = field(default_factory=dict)  # ‖W‖ of every edited tensor
    delta_norm: dict[str, float] = field(default_factory=dict)  # ‖ΔW‖ of every low-rank edit
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    changed: bool = False
    gpu_memory: int = 0  # bytes


@dataclass(frozen=True)
class Runtime:
    """Torch, ready to work."""

    devices: tuple[str, ...]
    seconds: float  # that the import and the devices took


def start_torch(device: str) -> Future[Runtime]:
    """Import torch and wake `device` in the background: that takes seconds in which bytes can be copied."""
    future: Future[Runtime] = Future()

    def load() -> None:
        started = time.monotonic()
        try:
            future.set_result(Runtime(find_devices(device), time.monotonic() - started))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=load, name="loratool-torch", daemon=True).start()
    return future


def find_devices(device: str) -> tuple[str, ...]:
    """The devices that "auto", "cpu", "cuda" or "cuda:N" mean here, each ready for work."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return ("cpu",)
    count = torch.cuda.device_count()
    if not count:
        raise UsageError(f"--device {printable(device)}: torch {torch.__version__} finds no CUDA device here")
    every = tuple(f"cuda:{n}" for n in range(count))
    if device.startswith("cuda:") and device not in every:
        raise UsageError(f"--device {printable(device)}: there are {', '.join(every)}")
    devices = (device,) if device.startswith("cuda:") else every
    for name in devices:
        torch.zeros(1, device=name)
    return devices


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 products in full float32, without TF32, for as long as this lasts."""
    import torch

    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)  # workers set it to 1


def choose_resources(
    plan: MergePlan, devices: tuple[str, ...], workers: int | None, max_memory: int | None, used: int
) -> Resources:
    """Workers and block size that keep the process within `max_memory` bytes, of which `used` are gone.

    Raises `UsageError` with the smallest limit that would do.
    """
    on_gpu = devices[0] != "cpu"
    chosen = workers or min(cores(), MOST_WORKERS)
    block = CUDA_BLOCK if on_gpu else CPU_BLOCK
    if max_memory is None:
        return Resources(devices, chosen, block)
    while (needed := used + work_memory(plan, chosen, block, on_gpu)) > max_memory:
        if block > SMALLEST_BLOCK:
            block //= 2
        elif chosen > 1:
            chosen -= 1
        else:
            raise UsageError(f"--max-memory: {max_memory} bytes are too little; {needed} is the least that works here")
    return Resources(devices, chosen, block)


def estimated_memory(plan: MergePlan, device: str, workers: int | None, max_memory: int | None) -> int:
    """Bytes that a merge is expected to keep resident, told without importing torch."""
    devices = ("cuda:0",) if device.startswith("cuda") else ("cpu",)
    used = RUNTIME_MEMORY + (CUDA_MEMORY if devices[0] != "cpu" else 0)
    chosen = choose_resources(plan, devices, workers, max_memory, used)
    return used + work_memory(plan, chosen.workers, chosen.block, chosen.on_gpu)


def work_memory(plan: MergePlan, workers: int, block: int, on_gpu: bool) -> int:
    """Bytes of host memory that `workers` need besides what Python and torch take."""
    touched = [span for span in plan.spans if not span.untouched]
    buffers = max((block_memory(span, block, on_gpu) for span in touched), default=0)
    factors = max((factor_memory(span) for span in touched), default=0)
    return WORKING_MEMORY + workers * (buffers + factors)


def block_memory(span: Span, block: int, on_gpu: bool) -> int:
    """Bytes of one worker's buffers for this span: the raw block, and on the CPU its float32 copy."""
    elements = rows_of_block(span, block) * span.info.width
    raw = elements * max(itemsize(span.info), itemsize(span.placed))
    return raw if on_gpu else raw + elements * (8 if span.info.dtype == "F64" else 4)


def factor_memory(span: Span) -> int:
    """Bytes of the loaded factors of one span, twice: as read and stacked."""
    ranks = sum(e.update.rank for e in span.edits if isinstance(e.update, LowRank))
    return 2 * ranks * (span.info.rows + span.info.width) * (8 if span.info.dtype == "F64" else 4)


def rows_of_block(span: Span, block: int) -> int:
    row = max(1, span.info.width * max(itemsize(span.info), itemsize(span.placed)))
    return max(1, min(span.info.rows, block // row))


def itemsize(info: TensorInfo) -> int:
    return {"F64": 8, "F32": 4}.get(info.dtype, 2)


def resident_memory() -> int:
    """Bytes of this process in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return RUNTIME_MEMORY
    return pages * os.sysconf("SC_PAGE_SIZE")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EditedSpan:
    """A span on its way through the workers, with its factors loaded once per device."""

    def __init__(self, span: Span, totals: Totals) -> None:
        self.span = span
        self.totals = totals
        self.lock = threading.Lock()
        self.loaded: dict[str, list[LoadedEdit]] = {}
        self.squared = 0.0  # of the rows seen so far
        self.rows_left = span.info.rows

    def edits_on(self, device: torch.device, dtype: torch.dtype) -> list[LoadedEdit]:
        """The edits ready to apply; all low-rank ones of the same rows are one product."""
        with self.lock:
            key = str(device)
            if key not in self.loaded:
                self.loaded[key] = load_edits(self.span.edits, device, dtype)
            return self.loaded[key]

    def seen(self, rows: int, norm: float, bound: float, nonfinite: int) -> None:
        """Account for a block that has been written."""
        name = self.span.placed.name
        with self.lock:
            self.squared += norm * norm
            self.rows_left -= rows
            if nonfinite:
                self.totals.nonfinite[name] = self.totals.nonfinite.get(name, 0) + nonfinite
            if not self.rows_left and self.span.edits:
                self.totals.weight_norm[name] = self.squared**0.5
                self.totals.delta_norm[name] = bound


@dataclass(frozen=True)
class LoadedEdit:
    """An edit with its factors in memory, or a replacement whose rows are read as they are needed."""

    first_row: int
    rows: int
    update: LowRank | Replace
    norm: float  # no element changes by more than this

    def apply(self, block: torch.Tensor, first_row: int) -> None:
        """Change the rows of `block`, which begins at `first_row` of the weight, that this edit covers."""
        start = max(first_row, self.first_row)
        stop = min(first_row + block.shape[0], self.first_row + self.rows)
        if start >= stop:
            return
        rows = block[start - first_row : stop - first_row]
        own = start - self.first_row
        if isinstance(self.update, Replace):
            part = load_rows(self.update, own, stop - start, block.device, block.dtype)
            part.add_rows(rows, 0, 1.0)
        else:
            self.update.add_rows(rows, own, 1.0)


def load_edits(edits: Sequence[Edit], device: torch.device, dtype: torch.dtype) -> list[LoadedEdit]:
    result: list[LoadedEdit] = []
    groups: dict[tuple[int, int], list[tuple[LowRank, float]]] = {}
    for edit in edits:
        if isinstance(edit.update, Replace):
            result.append(LoadedEdit(edit.first_row, edit.rows, edit.update, edit.update.norm()))
        elif isinstance(edit.update, LowRank):
            loaded = load_update(edit.update, device, dtype)
            groups.setdefault((edit.first_row, edit.rows), []).append((loaded, edit.strength))
    for (first_row, rows), updates in groups.items():
        stacked = stack(updates)
        # the norm comes back to the host, so the factors are complete for the streams of other workers too
        result.append(LoadedEdit(first_row, rows, stacked, stacked.norm()))
    return result


class Worker:
    """One thread's buffers on one device. On CUDA the raw buffer is pinned and has a twin on the device."""

    def __init__(self, device: str, raw_bytes: int, elements: int, wide: bool) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.host = torch.empty(raw_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.bytes = self.host.numpy().data
        self.raw = torch.empty(raw_bytes, dtype=torch.uint8, device=self.device) if on_gpu else self.host
        self.scratch = torch.empty(elements * (8 if wide else 4), dtype=torch.uint8, device=self.device)
        if not on_gpu:
            torch.set_num_threads(1)  # workers are the parallelism

    def carry(self, work: EditedSpan, first: int, count: int, source: int, target: int, offset: int) -> None:
        """Rows `first` … `first + count` of a span, from one descriptor to the other."""
        torch = self.torch
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self._carry(work, first, count, source, target, offset)

    def _carry(self, work: EditedSpan, first: int, count: int, source: int, target: int, offset: int) -> None:
        torch, span = self.torch, work.span
        width, file = span.info.width, span.source
        stored, rounded = (getattr(torch, FLOAT_NAMES[t.dtype]) for t in (span.info, span.placed))
        compute = torch.float64 if stored == torch.float64 else torch.float32
        read = count * width * stored.itemsize
        written = count * width * rounded.itemsize
        start = file.position(span.info) + first * width * stored.itemsize

        read_exactly(source, self.bytes[:read], start, file.path)
        if self.stream is not None:
            self.raw[:read].copy_(self.host[:read], non_blocking=True)
        block = self.scratch[: count * width * compute.itemsize].view(compute).view(count, width)
        block.copy_(self.raw[:read].view(stored).view(count, width))
        norm = torch.linalg.vector_norm(block)
        untouched = None if work.totals.changed or not span.edits else block.to(rounded)
        edits = work.edits_on(self.device, compute)
        for edit in edits:
            edit.apply(block, first)
        result = self.raw[:written].view(rounded).view(count, width)
        result.copy_(block)
        if untouched is not None and not torch.equal(untouched.view(torch.uint8), result.view(torch.uint8)):
            work.totals.changed = True
        if self.stream is not None:
            self.host[:written].copy_(self.raw[:written], non_blocking=True)
            self.stream.synchronize()
        base_norm, bound = float(norm), sum(edit.norm for edit in edits)
        nonfinite = 0
        if not base_norm + bound <= torch.finfo(rounded).max:  # |w + δ| ≤ ‖W‖ + ‖ΔW‖, so else nothing overflowed
            nonfinite = self.check_finite(span, read, start, source, self.host[:written].view(rounded))
        write_fully(target, self.bytes[:written], offset + first * width * rounded.itemsize)
        work.seen(count, base_norm, bound, nonfinite)

    def check_finite(self, span: Span, read: int, start: int, source: int, result: torch.Tensor) -> int:
        """NaN and inf of the base's own in this block; raises `FitError` when the merge made any."""
        torch = self.torch
        again = torch.empty(read, dtype=torch.uint8)
        read_exactly(source, again.numpy().data, start, span.source.path)
        before = again.view(getattr(torch, FLOAT_NAMES[span.info.dtype])).isfinite().logical_not()
        made = int((result.isfinite().logical_not() & before.logical_not()).sum())
        if made:
            raise FitError(
                f"{printable(span.info.name)}: {made} merged values exceed the range of {span.placed.dtype}; "
                "write a wider one with --dtype bfloat16 or float32, or give the adapter a smaller weight"
            )
        return int(before.sum())


class OutputShard:
    """One output file while it is being written, hashed and synced."""

    def __init__(self, plan: ShardPlan, folder: Path, stop: threading.Event) -> None:
        self.plan, self.stop = plan, stop
        path = folder / plan.name
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self.path = path
        self.descriptor = os.open(path, flags, 0o666)
        self.sources: dict[Path, tuple[SafeFile, int]] = {}
        self.changed = threading.Condition()
        self.ready = 0  # bytes from the file's start that are all written
        self.written = 0  # bytes written anywhere
        self.waiting: list[tuple[int, int]] = []  # written ranges beyond `ready`
        os.truncate(self.descriptor, plan.layout.size)
        write_fully(self.descriptor, plan.layout.header, 0)
        self.wrote(0, plan.layout.data_start)

    def source(self, file: SafeFile) -> int:
        """A descriptor of an input of this shard, open until the shard is closed."""
        with self.changed:
            if file.path not in self.sources:
                descriptor = open_regular(file.path)
                self.sources[file.path] = (file, descriptor)
                file.check_unchanged(descriptor)
            return self.sources[file.path][1]

    def wrote(self, start: int, stop: int) -> None:
        with self.changed:
            heapq.heappush(self.waiting, (start, stop))
            while self.waiting and self.waiting[0][0] <= self.ready:
                self.ready = max(self.ready, heapq.heappop(self.waiting)[1])
            self.written += stop - start
            self.changed.notify_all()

    def wait(self, what: str, amount: int) -> bool:
        """Until `ready` or `written` has come to `amount`; False when the merge is being stopped."""
        with self.changed:
            while getattr(self, what) < amount and not self.stop.is_set():
                self.changed.wait(0.2)
            return not self.stop.is_set()

    def hash(self) -> str:
        """SHA-256 of the file, read back behind the workers; empty when stopped."""
        digest, at, size = hashlib.sha256(), 0, self.plan.layout.size
        buffer = memoryview(bytearray(min(HASH_CHUNK, size)))
        while at < size:
            piece = buffer[: size - at]
            if not self.wait("ready", at + len(piece)):
                return ""
            read_exactly(self.descriptor, piece, at, self.path)
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()

    def sync(self) -> None:
        """Send what was written to the disk while more is being written, and all of it in the end."""
        synced, size = 0, self.plan.layout.size
        while synced < size and self.wait("written", min(synced + SYNC_CHUNK, size)):
            synced = self.written
            os.fsync(self.descriptor)

    def close(self) -> None:
        for _, descriptor in self.sources.values():
            os.close(descriptor)
        os.close(self.descriptor)


@dataclass(frozen=True)
class Copy:
    """A run of bytes that no edit touches."""

    shard: OutputShard
    file: SafeFile
    start: int  # in the source file
    stop: int
    target: int  # in the output file


@dataclass(frozen=True)
class Block:
    """Rows of an edited or converted span."""

    shard: OutputShard
    work: EditedSpan
    first: int
    count: int


class Engine:
    """Runs one plan into one stage. Its threads share a stream of tasks; the first failure stops them all."""

    def __init__(
        self,
        plan: MergePlan,
        stage: Stage,
        runtime: Future[Runtime],
        workers: int | None,
        max_memory: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.plan, self.stage, self.runtime = plan, stage, runtime
        self.workers, self.max_memory, self.progress = workers, max_memory, progress
        self.totals = Totals(changed=any(shard.changed for shard in stage.finished.values()))
        self.bytes_all = sum(span.placed.nbytes for span in plan.spans)
        self.bytes_done = 0
        self.stop = threading.Event()
        self.slots = threading.Semaphore(OPEN_SHARDS)
        self.taking = threading.Lock()  # of the task stream
        self.telling = threading.Lock()  # of progress and of finished shards
        self.choosing = threading.Lock()  # of the resources
        self.chosen: Resources | None = None
        self.failures: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def run(self) -> Totals:
        """Write every shard that the stage has not; each is hashed, synced and then recorded in the stage."""
        todo = [shard for shard in self.plan.shards if shard.name not in self.stage.finished]
        self.tell(self.bytes_all - sum(span.placed.nbytes for shard in todo for span in shard.spans))
        self.tasks = self.make_tasks(todo)
        # under a memory limit the number of threads is known only once torch is there
        count = self.workers or min(cores(), MOST_WORKERS) if self.max_memory is None else self.resources().workers
        try:
            for number in range(count):
                self.start(self.work, number)
            self.join()
            if self.failures:
                raise self.failures[0]
        except BaseException:
            self.halt()
            raise
        finally:
            if self.chosen is not None:
                self.precision.close()
        if self.resources().on_gpu:
            import torch

            self.totals.gpu_memory = sum(torch.cuda.max_memory_reserved(d) for d in self.resources().devices)
        return self.totals

    def resources(self) -> Resources:
        """Decided once torch is there, for only then is it known what memory is left."""
        with self.choosing:
            if self.chosen is None:
                devices = self.runtime.result().devices
                self.precision = ExitStack()
                self.precision.enter_context(exact_arithmetic())
                self.chosen = choose_resources(self.plan, devices, self.workers, self.max_memory, resident_memory())
            return self.chosen

    def tell(self, count: int) -> None:
        with self.telling:
            self.bytes_done += count
            if self.progress is not None:
                self.progress(self.bytes_done, self.bytes_all)

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                self.failures.append(error)
                self.stop.set()

        thread = threading.Thread(target=guarded, name=f"loratool-{target.__name__}", daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for all threads, those too that are started meanwhile; signals come through."""
        at = 0
        while at < len(self.threads):
            self.threads[at].join(0.1)
            at += not self.threads[at].is_alive()

    def halt(self) -> None:
        """Ask every thread to end, and give them a moment."""
        self.stop.set()
        until = time.monotonic() + 0.8
        for thread in list(self.threads):
            thread.join(max(0.0, until - time.monotonic()))

    def make_tasks(self, shards: Sequence[ShardPlan]) -> Iterator[Copy | Block]:
        for plan in shards:
            while not self.slots.acquire(timeout=0.1):
                if self.stop.is_set():
                    return
            shard = OutputShard(plan, self.stage.folder, self.stop)
            self.start(self.finish, shard)
            yield from copies(shard)  # first, since they need no torch
            for span in plan.spans:
                if not span.untouched and span.info.nbytes:
                    work = EditedSpan(span, self.totals)
                    step = rows_of_block(span, self.resources().block)
                    for first in range(0, span.info.rows, step):
                        yield Block(shard, work, first, min(step, span.info.rows - first))

    def work(self, number: int) -> None:
        """A worker's life: take the next task until there are none."""
        worker: Worker | None = None
        while not self.stop.is_set():
            with self.taking:
                task = next(self.tasks, None)
            if task is None:
                return
            if isinstance(task, Copy):
                source = task.shard.source(task.file)
                count = task.stop - task.start
                copy_bytes(source, task.shard.descriptor, count, task.start, task.target, task.file.path)
                task.shard.wrote(task.target, task.target + count)
            else:
                worker = worker or self.make_worker(number)
                count = self.carry(worker, task)
            self.tell(count)

    def make_worker(self, number: int) -> Worker:
        resources = self.resources()
        touched = [span for span in self.plan.spans if not span.untouched]
        elements = max(rows_of_block(s, resources.block) * s.info.width for s in touched)
        raw = max(
            rows_of_block(s, resources.block) * s.info.width * max(itemsize(s.info), itemsize(s.placed))
            for s in touched
        )
        wide = any(s.info.dtype == "F64" for s in touched)
        return Worker(resources.devices[number % len(resources.devices)], raw, elements, wide)

    def carry(self, worker: Worker, task: Block) -> int:
        span, shard = task.work.span, task.shard
        offset = shard.plan.layout.data_start + span.placed.start
        worker.carry(task.work, task.first, task.count, shard.source(span.source), shard.descriptor, offset)
        row = span.placed.nbytes // span.info.rows
        shard.wrote(offset + task.first * row, offset + (task.first + task.count) * row)
        return task.count * row

    def finish(self, shard: OutputShard) -> None:
        """See one output file to its end: hash it and sync it at the same time, then report it."""
        syncing: Future[None] = Future()

        def sync() -> None:
            try:
                shard.sync()
                syncing.set_result(None)
            except BaseException as error:
                syncing.set_exception(error)
                self.stop.set()

        threading.Thread(target=sync, name="loratool-sync", daemon=True).start()
        digest = shard.hash()
        syncing.result()  # a failed sync is final: the kernel may have dropped the bytes
        if self.stop.is_set():
            return  # descriptors stay open: a worker may still be writing
        for file, descriptor in shard.sources.values():
            file.check_unchanged(descriptor)
        shard.close()
        with self.telling:
            finished = FinishedShard(shard.plan.name, shard.plan.layout.size, digest, self.totals.changed)
            self.stage.record(finished)
        self.slots.release()


def copies(shard: OutputShard) -> Iterator[Copy]:
    """The untouched bytes of a shard, neighbours joined, cut into pieces an interrupt can wait for."""
    run: list[int] = []  # source start, source stop, target start
    file: SafeFile | None = None
    for span in (*shard.plan.spans, None):
        if span is not None and span.untouched:
            start = span.source.position(span.info)
            target = shard.plan.layout.data_start + span.placed.start
            if file is span.source and run[1] == start and run[2] + run[1] - run[0] == target:
                run[1] += span.info.nbytes
                continue
        if file is not None:
            for at in range(run[0], run[1], COPY_CHUNK):
                yield Copy(shard, file, at, min(at + COPY_CHUNK, run[1]), run[2] + at - run[0])
            file = None
        if span is not None and span.untouched:
            file, run = span.source, [start, start + span.info.nbytes, target]
