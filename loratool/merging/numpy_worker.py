"""A worker that computes with numpy, and takes torch only for what numpy cannot decide."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Semaphore
from typing import TYPE_CHECKING, Any

from loratool.bases.weights import Memory
from loratool.devices import exact_arithmetic, has_torch, resident_memory, runtime_memory
from loratool.errors import UsageError, printable
from loratool.files.open_sources import OpenSources
from loratool.files.sink import PAGE
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, numpy
from loratool.merging.compensating import compensated
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.gain import rows_apart
from loratool.merging.numpy_rounding import RESULTS
from loratool.merging.numpy_sums import Added, Tiles, readable
from loratool.merging.output_layout import Span
from loratool.merging.resources import Resources, rows_of_block

if TYPE_CHECKING:
    from loratool.merging.row_blocks import Worker


class NumpyWorker:
    """One thread's buffers. All of its spans are such as `numpy_sums.suits`."""

    def __init__(self, spans: Sequence[Span], resources: Resources, number: int, computing: Semaphore) -> None:
        """Those that compute hold `computing`; others read, hash and write meanwhile."""
        self.computing = computing
        self.spans, self.resources, self.number = spans, resources, number
        touched = [span for span in spans if not span.carried]
        most = max((rows_of_block(span, resources.block) * bytes_of_row(span) for span in touched), default=0)
        self.memory, self.outgoing = Memory(), pages(most + 2 * PAGE)
        self.tiles: dict[tuple[int, str], Tiles] = {}
        self.worker: Worker | None = None  # which computes with torch

    def merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """As `Worker.merged_rows`."""
        stop, result = shift + count * bytes_of_row(work.span), RESULTS[work.span.placed.dtype]
        after = self.outgoing[shift:stop].view(result.bits).reshape(count, -1)
        with self.computing:
            lap("wait")
            done = self.merge(work, first, after, sources)
        if not done:
            return self.by_torch(work, first, count, sources, shift)
        return self.outgoing[:stop].data

    def merge(self, work: EditedSpan, first: int, after: NDArray[Any], sources: OpenSources) -> bool:
        """Put merged rows into `after`, (n, width) of bits, and account for them; False where that takes torch."""
        span, weight = work.span, readable(work.span.weight)
        assert weight is not None
        self.memory.sources, self.memory.held = sources, work.held

        def read(values: NDArray[Any], first: int) -> None:
            weight.decode_into(values, first, self.memory)

        kind, result = (span.width, span.placed.dtype), RESULTS[span.placed.dtype]
        if kind not in self.tiles:
            self.tiles = {kind: Tiles(span.width, result)}
        tiles = self.tiles[kind]
        if not span.edits:
            return tiles.convert(read, first, after)
        (edit,) = span.edits
        meant = work.held.of("added", lambda: Added.by(edit, result.work))  # in a dtype that is precise enough
        lap("factors")
        if not meant.is_workable:
            return False
        added = meant
        if span.rounding == "compensated" and span.placed.dtype == "BF16":
            up, down, scale = meant.up, meant.down, meant.scale
            added = work.held.of("corrected", lambda: Added(*compensated(up, down, scale, read, "BF16"), 1.0))
        look = bool(work.waiting - work.totals.effective) or not work.totals.changed
        every = rows_apart(span.rows, span.width)
        seen = tiles.merge(added, read, first, after, every, look, meant, edit.target) if added.is_workable else None
        if seen is None:
            return False
        seen.change = meant.norm**2 * len(after) / span.rows
        work.merged(seen)
        return True

    def by_torch(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """The same rows by a worker that has torch."""
        if self.worker is None:
            self.check_memory(work.span)
        with exact_arithmetic():
            from loratool.merging.row_blocks import Worker

            self.worker = self.worker or Worker.of(self.spans, self.resources, self.number)
            return self.worker.merged_rows(work, first, count, sources, shift)

    def check_memory(self, span: Span) -> None:
        """Raise `UsageError` where torch is not there yet, and a limit leaves no memory for it."""
        limit = self.resources.max_memory
        if limit is None or has_torch():
            return
        if (needed := resident_memory() + runtime_memory()) > limit:
            least = -(-needed // 10**6)
            raise UsageError(
                f"--max-memory: {limit / 10**6:g} MB is too little; {printable(span.placed.name)} has values that "
                f"only torch can compute, which needs at least {least} MB",
                hint=f"--max-memory {least}MB",
            )


def bytes_of_row(span: Span) -> int:
    """Of the output."""
    return span.width * RESULTS[span.placed.dtype].itemsize


def pages(size: int) -> NDArray[Any]:
    """So many bytes from the start of a page on."""
    memory = numpy.empty(size + PAGE, numpy.uint8)
    return memory[-memory.ctypes.data % PAGE :][:size]
