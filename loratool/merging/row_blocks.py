"""Row blocks past their edits: read ▸ every edit ▸ round once. Where the rows go, nobody here knows.

A worker is one thread's buffers on one device. The CUDA worker is the CPU worker with a pinned staging buffer, a twin
of it on the device, and a stream of its own.
"""

from __future__ import annotations

import math
import threading

from loratool.bases.weights import Room
from loratool.errors import FitError, printable
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.sink import PAGE
from loratool.lazy import torch
from loratool.merging.exact_rows import Scratch, Seen
from loratool.merging.loaded_edits import LoadedEdits, has_effect, load_edits, same_bits
from loratool.merging.output_layout import Span
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import Totals


class EditedSpan:
    """A span on its way through the workers, with its factors loaded once per device."""

    def __init__(self, span: Span, totals: Totals, shared: SharedUpdates) -> None:
        self.span, self.totals, self.shared = span, totals, shared
        self.lock = threading.Lock()
        self.loaded: dict[str, LoadedEdits] = {}
        self.squared = 0.0  # ‖W‖² of the rows seen so far
        self.changed = 0.0  # ‖ΔW‖² of them, where it is not known beforehand
        self.rows_left = span.rows
        self.waiting = {(edit.adapter, edit.target) for edit in span.edits}  # updates that have changed nothing so far
        totals.measured |= self.waiting

    def edits_on(self, device: torch.device) -> LoadedEdits:
        """The edits ready to apply on `device`."""
        with self.lock:
            key = str(device)
            if key not in self.loaded:
                self.loaded[key] = load_edits(self.span, self.shared, device)
            return self.loaded[key]

    def look_for_effects(self, loaded: LoadedEdits, block: torch.Tensor, first: int) -> None:
        """Note which updates change an element of `block`, which holds rows from `first` on as they are stored."""
        effective = self.totals.effective
        self.waiting = self.waiting - effective
        for effect in self.waiting:
            if effect not in effective and has_effect(loaded.only(effect), block, first):
                effective.add(effect)

    def seen(self, rows: int, block: Seen, whole: float, nonfinite: int) -> None:
        """Account for a block that has been written; `whole` is ‖ΔW‖ of all blocks, or infinite where nobody knows."""
        name = self.span.placed.name
        with self.lock:
            self.squared += block.weight
            self.changed += block.change
            self.rows_left -= rows
            if nonfinite:
                self.totals.nonfinite[name] = self.totals.nonfinite.get(name, 0) + nonfinite
            if not self.rows_left and self.span.edits:
                self.totals.weight_norm[name] = self.squared**0.5
                self.totals.delta_norm[name] = whole if math.isfinite(whole) else self.changed**0.5


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
        if not on_gpu:
            torch.set_num_threads(1)  # workers are the parallelism

    def merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """Rows `first` … `first + count` of a span as they are in the output.

        What comes back holds them from byte `shift` on, and begins with a page; the next call overwrites it.
        """
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            return self._merged_rows(work, first, count, sources, shift)

    def _merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        span = work.span
        stored, rounded = (getattr(torch, FLOAT_NAMES[name]) for name in (span.weight.exact, span.placed.dtype))
        written = count * span.width * rounded.itemsize
        ready = self.outgoing[shift : shift + written]
        in_place = self.stream is None and shift % rounded.itemsize == 0

        before = span.matrix.rows(first, count, self.device, stored, Room(sources, self.host, self.twin))
        after = (ready if in_place else self.merged[:written]).view(rounded).view(count, span.width)
        loaded = work.edits_on(self.device)
        measured = loaded.is_bound and not loaded.replacements
        seen = loaded.merge(before, first, after, self.scratch, measured)
        if not work.totals.changed and span.edits and not same_bits(before.to(rounded), after):
            work.totals.changed = True  # never set to False: another worker may have seen a change meanwhile
        if work.waiting:
            work.look_for_effects(loaded, before, first)
        if not in_place:
            ready.copy_(self.merged[:written], non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()
        nonfinite = 0 if seen.largest <= torch.finfo(rounded).max else check_finite(span, before, after)
        # before the bytes go: a file whose bytes are all there is recorded with what was seen of it
        whole = math.inf if measured or loaded.replacements else loaded.norm
        work.seen(count, seen, whole, nonfinite)
        return self.outgoing[: shift + written].numpy().data


def pages_of(memory: torch.Tensor) -> torch.Tensor:
    """`memory` from its first whole page on."""
    return memory[-memory.data_ptr() % PAGE :]


def check_finite(span: Span, before: torch.Tensor, after: torch.Tensor) -> int:
    """How many NaN and inf the base itself has in a block; raises `FitError` when the merge made any."""
    own = before.isfinite().logical_not()
    made = int((after.isfinite().logical_not() & own.logical_not()).sum())
    if made:
        raise FitError(
            f"{printable(span.weight.tensors[0].info.name)}: {made} merged values exceed the range of "
            f"{span.placed.dtype}; pass --dtype bfloat16 or float32, or a smaller weight for the adapter"
        )
    return int(own.sum())
