"""A worker that computes with numpy, and takes torch only for what numpy cannot decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratool.devices import exact_arithmetic
from loratool.files.open_sources import OpenSources
from loratool.files.sink import PAGE
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, numpy
from loratool.merging.exact_rows import Seen
from loratool.merging.gain import rows_apart
from loratool.merging.numpy_sums import Added, Measured, Tiles, kind_of
from loratool.merging.output_layout import Span
from loratool.merging.resources import Resources, rows_of_block
from loratool.merging.row_blocks import EditedSpan, Worker


class NumpyWorker:
    """One thread's buffers. All of its spans are such as `numpy_sums.suits`."""

    def __init__(self, spans: Sequence[Span], resources: Resources, number: int) -> None:
        self.spans, self.resources, self.number = spans, resources, number
        touched = [span for span in spans if not span.carried]
        most = max((rows_of_block(span, resources.block) * span.width for span in touched), default=0)
        raw = max((rows_of_block(span, resources.block) * row_bytes(span) for span in touched), default=0)
        self.raw, self.outgoing = numpy.empty(raw, numpy.uint8), pages(2 * most + 2 * PAGE)
        self.tiles: dict[int, Tiles] = {}
        self.worker: Worker | None = None  # which computes with torch

    def merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """As `Worker.merged_rows`."""
        span, added = work.span, work.held.of("added", lambda: added_to(work.span))
        lap("factors")
        stop = shift + 2 * count * span.width
        after = self.outgoing[shift:stop].view(numpy.uint16).reshape(count, -1)
        seen = self.merge(work, added, first, after, sources) if added.is_workable else None
        if seen is None:
            return self.by_torch(work, first, count, sources, shift)
        self.account(work, added, count, seen)
        return self.outgoing[:stop].data

    def merge(
        self, work: EditedSpan, added: Added, first: int, after: NDArray[Any], sources: OpenSources
    ) -> Measured | None:
        """Put merged rows into `after`, (n, width) of bits; None where that takes torch."""
        span = work.span
        (tensor,) = span.weight.tensors
        raw = self.raw[: len(after) * row_bytes(span)]
        tensor.read(first * row_bytes(span), raw.data, sources)
        lap("read", len(raw))
        if span.width not in self.tiles:
            self.tiles = {span.width: Tiles(span.width)}
        look = bool(work.waiting - work.totals.effective) or not work.totals.changed
        every = rows_apart(span.rows, span.width)
        return self.tiles[span.width].merge(added, kind_of(span.weight), raw, first, after, every, look)

    def account(self, work: EditedSpan, added: Added, count: int, seen: Measured) -> None:
        """Note what was seen of a block."""
        span, (edit,) = work.span, work.span.edits
        if seen.changed:
            work.totals.changed = True
            work.totals.effective |= work.waiting
        every = rows_apart(span.rows, span.width)
        kept = {edit.target: (every * seen.kept[0], every * seen.kept[1])} if seen.sampled else {}
        work.seen(count, Seen(weight=seen.weight, kept=kept), added.norm, 0)

    def by_torch(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """The same rows by a worker that has torch."""
        with exact_arithmetic():
            self.worker = self.worker or Worker.of(self.spans, self.resources, self.number)
            return self.worker.merged_rows(work, first, count, sources, shift)


def added_to(span: Span) -> Added:
    """What the one edit of a span adds."""
    (edit,) = span.edits
    return Added.by(edit)


def row_bytes(span: Span) -> int:
    """Bytes of a row as it is stored."""
    return span.weight.tensors[0].info.nbytes // max(1, span.rows)


def pages(size: int) -> NDArray[Any]:
    """So many bytes from the start of a page on."""
    memory = numpy.empty(size + PAGE, numpy.uint8)
    return memory[-memory.ctypes.data % PAGE :][:size]
