"""Every tensor of a merged model against the formula, block by block, in the memory and with the threads of a merge."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from loratool.algebra.rounding import round_once
from loratool.arguments import Progress
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Held, Plain, Room
from loratool.devices import Awaited, exact_arithmetic, load_linear_algebra, resident_memory
from loratool.files.crew import in_threads
from loratool.files.open_sources import OpenSources
from loratool.files.process import cores
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, numpy, torch
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.resources import (
    NUMPY_WORKERS,
    Resources,
    choose_resources,
    most_workers,
    rows_of_block,
    sums_products,
)
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import Totals
from loratool.verifying import quick
from loratool.verifying.distances import Distances, Found, measure, same
from loratool.verifying.halves import residual_of
from loratool.verifying.options import RESIDUAL, STEPWISE, TWICE, VerifyOptions
from loratool.verifying.pairing import Pair
from loratool.verifying.quantised import aligned, beyond_half_step, is_quantised
from loratool.verifying.quick import product_of
from loratool.verifying.quick_numpy import Halved, Tile, suffices
from loratool.verifying.scales import Measured
from loratool.verifying.updates import Updates, doubt_of, rounded_twice

if TYPE_CHECKING:
    from loratool.merging.row_blocks import Worker

PIECE = 1 << 20  # bytes that are compared at a time
RUN = 64 << 20  # bytes of a tensor that one thread compares
TOGETHER = 1 << 21  # elements that one thread compares by numpy
Task = Callable[["Bench"], int]  # gives the bytes that it has read


@dataclass
class Bench:
    """What one thread works with."""

    proving: Proving
    number: int
    tile: Tile | None = None

    def tile_of(self, width: int) -> Tile:
        """Memory in which numpy computes."""
        if self.tile is None or self.tile.width != width:
            self.tile = Tile(width, memory=self.tile.memory if self.tile else None)
        return self.tile

    @cached_property
    def pieces(self) -> tuple[memoryview, memoryview]:
        """Memory for bytes of both sides."""
        return memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE))

    @cached_property
    def worker(self) -> Worker:
        """The buffers in which a merge computes."""
        from loratool.merging.row_blocks import Worker  # with all that torch computes

        return Worker.of(self.proving.computed, self.proving.resources(), self.number)

    @cached_property
    def host(self) -> Tensor:
        """Memory for rows of the merged model, pinned for a GPU."""
        size, on_gpu = self.worker.merged.numel(), self.worker.stream is not None
        return torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)

    @cached_property
    def twin(self) -> Tensor | None:
        """As much on the GPU."""
        on_gpu = self.worker.stream is not None
        return torch.empty(len(self.host), dtype=torch.uint8, device=self.worker.device) if on_gpu else None


@dataclass
class Subject:
    """An edited or converted tensor on its way through the threads."""

    pair: Pair
    work: EditedSpan
    distances: Distances
    held: Held = field(default_factory=Held)  # of the merged model's weight
    odd: bool = False  # whether numpy left some of it to torch
    measured: Measured = field(default_factory=Measured)  # of the formula, where the merged model's weight is quantised

    @property
    def doubt(self) -> float:
        """How far elements of the formula may be off where a tool works it out in float32."""
        return self.work.held.of("doubt", lambda: doubt_of(self.pair.span))

    def halves(self) -> Halved:
        """What numpy adds."""
        return self.work.held.of("halved", lambda: Halved.by(*self.pair.span.edits))

    def load(self, _: Bench) -> int:
        """A task that makes what numpy adds; its few bytes do not count."""
        self.halves()
        return 0


class Proving:
    """Compares pairs of tensors; what it saw of each is in `distances`."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        runtime: Awaited,
        options: VerifyOptions,
        rounding: str,
        progress: Progress | None,
    ) -> None:
        self.pairs = [pair.rounded("nearest" if rounding in STEPWISE else rounding) for pair in pairs]
        self.runtime, self.options, self.rounding, self.progress = runtime, options, rounding, progress
        self.distances = {pair.name: Distances() for pair in pairs}
        computed = [pair for pair in self.pairs if not self.is_copy(pair)]
        self.computed = [pair.span for pair in computed]
        self.by_numpy = rounding == "nearest" and suffices(computed, options.device)
        if computed and not self.by_numpy:
            runtime.start()
        # of those that compute by numpy, more than there are cores wait for the interpreter's lock
        self.workers = options.threads or (min(cores(), NUMPY_WORKERS) if self.by_numpy else most_workers())
        self.totals, self.shared = Totals(), SharedUpdates()
        self.sources = OpenSources()
        self.lock, self.choosing, self.stop = threading.Lock(), threading.Lock(), threading.Event()
        self.bytes_all, self.bytes_done = sum(pair.nbytes for pair in pairs), 0
        self.chosen: Resources | None = None
        self.todo = self.tasks()

    @staticmethod
    def is_copy(pair: Pair) -> bool:
        """Whether its bytes are to be those of a tensor that is there."""
        span, theirs = pair.span, pair.theirs
        return span.carried is not None and isinstance(theirs, Plain) and theirs.dtype == span.carried.info.dtype

    def resources(self) -> Resources:
        """Decided once torch is there."""
        with self.choosing:
            if self.chosen is None:
                devices = self.runtime.start().result().devices
                if not all(map(sums_products, self.computed)):
                    load_linear_algebra(devices)
                workers, limit = self.options.threads, self.options.max_memory
                self.chosen = choose_resources(self.computed, devices, workers, limit, resident_memory())
            return self.chosen

    def run(self) -> None:
        """Compare everything."""
        with self.sources:
            in_threads(self.work, self.workers, self.stop)
            self.sources.check_unchanged()

    def work(self, number: int) -> None:
        """A thread's life: take the next task until there is none."""
        bench = Bench(self, number)
        while not self.stop.is_set():
            with self.lock:
                task = next(self.todo, None)
            if task is None:
                return
            self.tell(task(bench))

    def tell(self, count: int) -> None:
        with self.lock:
            self.bytes_done += count
            if self.progress is not None:
                self.progress(self.bytes_done, self.bytes_all)

    def tasks(self) -> Iterator[Task]:
        """Copies first, while torch is on its way; then blocks of rows."""
        for pair in self.pairs:
            if self.is_copy(pair):
                for start in range(0, max(1, pair.span.placed.nbytes), RUN):
                    yield partial(self.compare_bytes, pair, start)
        before: Subject | None = None
        for pair in self.pairs:
            if not self.is_copy(pair):
                subject = Subject(pair, EditedSpan(pair.span, self.totals, self.shared), self.distances[pair.name])
                if not self.by_numpy:
                    yield from self.all_blocks(subject, 0, pair.rows)
                    continue
                yield subject.load  # while other threads are at the weight before
                yield from self.all_by_numpy(before)
                before = subject
        yield from self.all_by_numpy(before)

    def all_by_numpy(self, subject: Subject | None) -> Iterator[Task]:
        """Compare all rows by numpy."""
        if subject is not None:
            step = max(1, TOGETHER // max(1, subject.pair.span.width))
            for first in range(0, subject.pair.rows, step):
                yield partial(self.compare_by_numpy, subject, first, min(step, subject.pair.rows - first))

    def all_blocks(self, subject: Subject, first: int, stop: int) -> Iterator[Task]:
        """Compare some rows in blocks."""
        pair = subject.pair
        step = aligned(pair.theirs, pair.span.width, rows_of_block(pair.span, self.resources().block))
        for at in range(first, stop, step):
            yield partial(self.compare_block, subject, at, min(step, stop - at))

    def compare_by_numpy(self, subject: Subject, first: int, count: int, bench: Bench) -> int:
        """Compare some rows, with torch where numpy does not settle them, and from then on all of that tensor."""
        pair, width = subject.pair, subject.pair.span.width
        halved = subject.halves()
        workable = halved.added.is_workable and not subject.odd
        if workable and bench.tile_of(width).settled(pair, halved, first, count, self.sources):
            subject.distances.note(count * width, None)
            return pair.nbytes * count // max(1, pair.span.rows)
        subject.odd = True
        return sum(task(bench) for task in self.all_blocks(subject, first, first + count))

    def compare_bytes(self, pair: Pair, start: int, bench: Bench) -> int:
        """Compare a run of bytes."""
        ours, theirs = pair.span.carried, pair.theirs.tensors[0]
        assert ours is not None
        stop, (one, other) = min(start + RUN, ours.info.nbytes, theirs.info.nbytes), bench.pieces
        itemsize = max(1, ours.info.nbytes // max(1, ours.info.elements))
        for at in range(start, stop, PIECE):
            count = min(PIECE, stop - at)
            ours.read(at, one[:count], self.sources)
            theirs.read(at, other[:count], self.sources)
            self.distances[pair.name].note(count // itemsize, unequal(pair, one[:count], other[:count], at))
        return 2 * max(0, stop - start)

    def compare_block(self, subject: Subject, first: int, count: int, bench: Bench) -> int:
        """Compare a block of rows."""
        worker, span = bench.worker, subject.pair.span
        target: torch.dtype = getattr(torch, FLOAT_NAMES[span.placed.dtype])
        room = Room(self.sources, bench.host, bench.twin, subject.held)
        with exact_arithmetic(), worker.computing():
            loaded = subject.work.edits_on(worker.device)
            product = None if self.rounding in STEPWISE else product_of(loaded, first, count)
            theirs = subject.pair.theirs.matrix(span.width).rows(first, count, worker.device, target, room)
            before = worker.stored_rows(subject.work, first, count, self.sources)
            after = worker.space(count, span.width, target)
            if product is not None and loaded.sum is not None:
                found = quick.compare(loaded.sum, product, before, theirs, first, after)
            elif is_quantised(subject.pair.theirs):
                self.formula(worker, subject, first, before, after)
                weight = subject.pair.theirs.matrix(span.width)
                found = beyond_half_step(weight, after, theirs, first, subject.held, Room(self.sources))
                if isinstance(weight, Requantizable) and span.edits:
                    subject.measured.note(weight, after, first)
            else:
                operand = self.formula(worker, subject, first, before, after)
                total = None if self.rounding == RESIDUAL else loaded.sum
                formula = total is None and bool(loaded.others)
                found = None if same(after, theirs) else measure(operand, after, theirs, first, total, formula)
                if found is not None and found.ulp > 1 and subject.doubt:
                    found = measure(operand, after, theirs, first, None, True, subject.doubt)
        subject.distances.note(count * span.width, found)
        self.hold_parameters(subject)
        return subject.pair.nbytes * count // max(1, span.rows)

    def hold_parameters(self, subject: Subject) -> None:
        """Compare the parameters of a quantised weight, once all of its rows have been."""
        span, seen = subject.pair.span, subject.distances
        theirs = subject.pair.theirs.matrix(span.width)
        with seen.lock:
            done = seen.elements == span.rows * span.width and subject.measured.blocks
            measured, subject.measured = subject.measured, Measured() if done else subject.measured
        if done and isinstance(theirs, Requantizable):
            seen.parameters = measured.unlike(theirs, span.matrix)

    def formula(self, worker: Worker, subject: Subject, first: int, before: Tensor, after: Tensor) -> Tensor:
        """Put rows of W' from `first` on as the formula gives them into `after`; `before` has those of W.

        What comes back is the operand at whose size distances count: W, or what is larger of that and its residual.
        """
        if self.rounding not in STEPWISE:
            worker.merge(subject.work, first, self.sources, after)
            return before
        device = worker.device
        updates: Updates = subject.work.held.of(("updates", device), lambda: Updates(subject.pair.span, device))
        weight = updates.begin(before, first)
        if self.rounding == TWICE:
            after.copy_(rounded_twice(weight, updates.changes(weight, first), after.dtype))
            return before
        residual, trained = residual_of(updates, weight, first, after.dtype)
        after.copy_(round_once(residual + trained, after.dtype))
        return torch.where(residual.abs() > weight.abs(), residual, weight).float()


def unequal(pair: Pair, ours: memoryview, theirs: memoryview, at: int) -> Found | None:
    """What differs between two pieces of a tensor that should be the same, from byte `at` of it on; None where nothing does."""
    kind = numpy.uint8 if len(ours) % 8 else numpy.uint64  # many at a time
    if numpy.array_equal(numpy.frombuffer(ours, kind), numpy.frombuffer(theirs, kind)):
        return None
    info = pair.span.placed
    if info.dtype not in FLOAT_NAMES:
        itemsize = max(1, info.nbytes // max(1, info.elements))
        raw = [numpy.frombuffer(each, numpy.uint8).reshape(-1, itemsize) for each in (ours, theirs)]
        count = int((raw[0] != raw[1]).any(1).sum())
        return Found(count, math.inf, 0.0, count, ())
    dtype: torch.dtype = getattr(torch, FLOAT_NAMES[info.dtype])
    one, other = (torch.frombuffer(each, dtype=dtype)[:, None] for each in (ours, theirs))
    found = measure(one, one, other, 0)
    if found is None:
        return None
    row = at // dtype.itemsize // max(1, info.width)
    return dataclasses.replace(found, rows=(row,) if found.rows else ())
