"""Row blocks past their edits: read ▸ every edit ▸ round once. Where the rows go, nobody here knows.

A worker is one thread's buffers on one device. The CUDA worker is the CPU worker with a pinned staging buffer, a twin
of it on the device, and a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loratool.adapters.adapter import StoredTensor
from loratool.bases.weights import Room, StoredWeight
from loratool.errors import FitError, printable
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.sink import PAGE
from loratool.files.stopwatch import lap
from loratool.lazy import torch
from loratool.merging.edited_spans import EditedSpan
from loratool.merging.exact_rows import Scratch, matrix_in
from loratool.merging.output_layout import Span
from loratool.merging.resources import Resources, itemsize, needs_float64, rows_of_block, tile_elements


class Worker:
    """One thread's buffers on one device. On CUDA the host's buffer is pinned, and a block's bytes go through it."""

    def __init__(self, device: str, raw_bytes: int, elements: int, wide: bool) -> None:
        """`elements` are those that are computed at a time, `wide` tells whether any are computed in float64."""
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.outgoing = pages_of(torch.empty(raw_bytes + 2 * PAGE, dtype=torch.uint8, pin_memory=on_gpu))
        # on CUDA a block has left the host's memory before its result comes there
        self.host = self.outgoing if on_gpu else torch.empty(raw_bytes, dtype=torch.uint8)
        self.twin = torch.empty(raw_bytes, dtype=torch.uint8, device=self.device) if on_gpu else None
        self.merged = torch.empty(raw_bytes, dtype=torch.uint8, device=self.device)
        self.scratch = Scratch(self.device, elements, 8 if wide else 4)
        self.read: tuple[StoredWeight, int, torch.Tensor] | None = None  # rows that are in memory, from which one on
        if not on_gpu:
            torch.set_num_threads(1)  # workers are the parallelism

    @classmethod
    def of(cls, spans: Sequence[Span], resources: Resources, number: int) -> Worker:
        """Worker `number` of those that work on some spans."""
        touched, block = [span for span in spans if not span.untouched], resources.block
        elements = max((tile_elements(span, block, resources.on_gpu) for span in touched), default=0)
        raw = max((rows_of_block(span, block) * span.width * itemsize(span) for span in touched), default=0)
        wide = resources.on_gpu or any(map(needs_float64, touched))
        return cls(resources.devices[number % len(resources.devices)], max(raw, block), elements, wide)

    def merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """Rows `first` … `first + count` of a span as they are in the output.

        What comes back holds them from byte `shift` on, and begins with a page; the next call overwrites it.
        """
        rounded: torch.dtype = getattr(torch, FLOAT_NAMES[work.span.placed.dtype])
        written = count * work.span.width * rounded.itemsize
        ready = self.outgoing[shift : shift + written]
        in_place = self.stream is None and shift % rounded.itemsize == 0
        with self.computing():
            after = ready if in_place else self.merged[:written]
            self.merge(work, first, sources, after.view(rounded).view(count, -1))
            if not in_place:
                ready.copy_(after, non_blocking=True)
        return self.outgoing[: shift + written].numpy().data

    def both_rows(
        self, work: EditedSpan, first: int, count: int, sources: OpenSources
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a span's weight, and what its edits make of them, in float32 on this worker's device."""
        with self.computing():
            before = self.stored_rows(work, first, count, sources).float()
            after = self.space(count, work.span.width, torch.float32)
            work.edits_on(self.device).merge(before, first, after, self.scratch, measure=False)
        return before, after

    def space(self, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for merged rows, (count, width): the worker's, but where more rows come together than a block has."""
        return matrix_in(self.merged, count, width, dtype)

    def lent(self, data: torch.Tensor, shift: int) -> memoryview:
        """Bytes of the host, (n,) of uint8 and no more than a block, as a sink takes them: as from `merged_rows`."""
        self.outgoing[shift : shift + len(data)].copy_(data)
        return self.outgoing[: shift + len(data)].numpy().data

    def fill(self, work: EditedSpan, first: int, sources: OpenSources, rows: torch.Tensor) -> None:
        """Put rows of a span, from row `first` on, into `rows`, (n, width) of the output's dtype on any device."""
        with self.computing():
            here = rows.device == self.device
            after = rows if here else self.merged[: rows.nbytes].view(rows.dtype).view(rows.shape)
            self.merge(work, first, sources, after)
            if not here:
                rows.copy_(after)

    def carry(self, tensor: StoredTensor, start: int, sources: OpenSources, piece: torch.Tensor) -> None:
        """Put bytes of a stored tensor, from byte `start` on, into `piece`, (n,) of uint8 on any device."""
        self.read, held = None, piece if piece.device.type == "cpu" else self.host[: piece.numel()]
        tensor.read(start, held.numpy().data, sources)
        if held is not piece:
            with self.computing():
                piece.copy_(held, non_blocking=True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Work on this worker's stream, which is done when this ends."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            yield
            if self.stream is not None:
                self.stream.synchronize()
                lap("transfer")

    def merge(self, work: EditedSpan, first: int, sources: OpenSources, after: torch.Tensor) -> None:
        """Put merged rows of a span, from row `first` on, into `after`, and account for them.

        That comes before anybody has the bytes: a file whose bytes are all there is recorded with what was seen of it.
        """
        span = work.span
        before = self.stored_rows(work, first, len(after), sources)
        loaded = work.edits_on(self.device)
        lap("factors")
        seen = loaded.merge(before, first, after, self.scratch, measure=True)
        lap("formula" if loaded.sum is None else "round")
        if span.edits and (work.waiting or not work.totals.changed):
            work.look_for_effects(loaded, before, first, after)
        lap("look")
        if not seen.largest <= torch.finfo(after.dtype).max:
            seen.nonfinite = check_finite(span, before, after)
        work.merged(seen)

    def stored_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources) -> torch.Tensor:
        """Rows of a span's weight as they are stored, read once for all outputs that ask for them in turn.

        The files are among `sources` in any case, where they are found to be unchanged in the end.
        """
        weight = work.span.matrix
        for tensor in weight.tensors:
            sources.of(tensor.file)
        if self.read is not None:
            same, start, rows = self.read
            if start <= first and first + count <= start + len(rows) and same == weight:
                return rows[first - start : first - start + count]
        stored, room = getattr(torch, FLOAT_NAMES[weight.exact]), Room(sources, self.host, self.twin, work.held)
        self.read = None  # its memory is used again
        rows = weight.rows(first, count, self.device, stored, room)
        self.read = weight, first, rows
        lap("decode")
        return rows


def pages_of(memory: torch.Tensor) -> torch.Tensor:
    """`memory` from its first whole page on."""
    return memory[-memory.data_ptr() % PAGE :]


def check_finite(span: Span, before: torch.Tensor, after: torch.Tensor) -> int:
    """How many NaN and inf the base itself has in a block; raises `FitError` when the merge made any."""
    own = before.isfinite().logical_not()
    if bool((after.isfinite().logical_not() & own.logical_not()).any()):
        raise FitError(
            f"{printable(span.weight.tensors[0].info.name)}: merged values exceed the range of {span.placed.dtype}; pass "
            "--dtype bfloat16 or float32, or a smaller weight for the adapter"
        )
    return int(own.sum())
