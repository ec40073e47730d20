"""Row blocks past their edits: read ▸ to float32 ▸ every edit ▸ round once ▸ write.

A worker is one thread's buffers on one device. The CUDA worker is the CPU worker with a pinned
staging buffer, a twin of it on the device, and a stream of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.adapter import load_rows, load_update
from loratool.errors import FitError, printable
from loratool.safefile import FLOAT_NAMES, read_exactly, write_fully
from loratool.updates import LowRank, Replace, stack

if TYPE_CHECKING:
    import torch

    from loratool.planning import Edit, Span


@dataclass
class Totals:
    """What was seen while the bytes went by."""

    weight_norm: dict[str, float] = field(default_factory=dict)  # ‖W‖ of every edited tensor
    delta_norm: dict[str, float] = field(default_factory=dict)  # ‖ΔW‖ of every low-rank edit
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    changed: bool = False
    gpu_memory: int = 0  # bytes


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
        untouched = None if work.totals.changed or not span.edits else block.to(rounded, copy=True)
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
