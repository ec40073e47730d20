"""Row blocks past their edits: read ▸ to float32 ▸ every edit ▸ round once. Where the rows go, nobody here knows.

A worker is one thread's buffers on one device. The CUDA worker is the CPU worker with a pinned
staging buffer, a twin of it on the device, and a stream of its own.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from loratool.adapters.adapter import load_rows, load_update
from loratool.algebra.updates.additive import LowRank, stack
from loratool.algebra.updates.replacing import Replace
from loratool.bases.weights import Room
from loratool.errors import FitError, printable
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.sink import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from loratool.algebra.updates.base import Update
    from loratool.bases.edits import Edit
    from loratool.merging.output_layout import Span

LOOKED_AT = 1 << 19  # elements that are searched for small values at a time
READ_AT_ONCE = 16 << 20  # bytes of a weight that is looked at before it is edited
ALL = slice(None)
LOOKED_AT_FIRST = 1 << 14  # elements in which the effect of an update is looked for at first; most show it there
SETTLED_TOGETHER = 4096  # values that are recomputed at a time; each takes two rows of factors


Effect = tuple[int, str]  # an update: the number of its adapter, and its target


@dataclass
class Totals:
    """What was seen while the bytes went by."""

    weight_norm: dict[str, float] = field(default_factory=dict)  # ‖W‖ of every edited tensor
    delta_norm: dict[str, float] = field(default_factory=dict)  # ‖ΔW‖ of it; 0 where something replaces the weight
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    measured: set[Effect] = field(default_factory=set)  # the updates that were looked at
    effective: set[Effect] = field(default_factory=set)  # those of them that change an element by themselves
    changed: bool = False
    gpu_memory: int = 0  # bytes

    def ratios(self, names: Iterable[str]) -> dict[str, float]:
        """‖ΔW‖/‖W‖ of those of some tensors that were edited, where both are finite and W is not zero."""
        found = {name: (self.delta_norm[name], self.weight_norm[name]) for name in names if name in self.delta_norm}
        return {
            name: delta / weight
            for name, (delta, weight) in found.items()
            if math.isfinite(delta) and math.isfinite(weight) and weight > 0
        }


class Shelf:
    """Loaded updates that edits of several spans share, such as the factors of all experts; the `most` last used ones."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.kept: dict[tuple[int, str, torch.dtype], tuple[Update, Update]] = {}

    def load(self, update: Update, device: torch.device, dtype: torch.dtype) -> Update:
        key = (id(update), str(device), dtype)
        with self.lock:
            pair = self.kept.pop(key, None) or (update, load_update(update, device, dtype))
            self.kept[key] = pair
            while len(self.kept) > self.most:
                del self.kept[next(iter(self.kept))]
            return pair[1]


class EditedSpan:
    """A span on its way through the workers, with its factors loaded once per device."""

    def __init__(self, span: Span, totals: Totals, shelf: Shelf) -> None:
        self.span, self.totals, self.shelf = span, totals, shelf
        self.lock = threading.Lock()
        self.loaded: dict[str, LoadedEdits] = {}
        self.squared = 0.0  # ‖W‖² of the rows seen so far
        self.changed = 0.0  # ‖ΔW‖² of them, where it is not known beforehand
        self.rows_left = span.rows
        self.waiting = {(edit.adapter, edit.target) for edit in span.edits}  # updates that have changed nothing so far
        totals.measured |= self.waiting

    def edits_on(self, device: torch.device, dtype: torch.dtype) -> LoadedEdits:
        """The edits ready to apply on `device`."""
        with self.lock:
            key = str(device)
            if key not in self.loaded:
                self.loaded[key] = load_edits(self.span, self.shelf, device, dtype)
            return self.loaded[key]

    def look_for_effects(self, loaded: LoadedEdits, block: torch.Tensor, first: int, rounded: torch.dtype) -> None:
        """Note which updates change an element of `block`, which holds rows from `first` on as they are stored."""
        effective = self.totals.effective
        self.waiting = self.waiting - effective
        for edit, update, strength in (alone for each in loaded.edits for alone in each.alone()):
            effect, own = (edit.adapter, edit.target), LoadedEdit(edit, update, strength)
            open_yet = effect in self.waiting and effect not in effective
            if open_yet and has_effect(own, block, first, loaded.dtype, rounded):
                effective.add(effect)

    def seen(self, rows: int, norm: float, change: float, whole: float, nonfinite: int) -> None:
        """Account for a block that has been written.

        `norm` is ‖W‖ of it, `change` ‖ΔW‖ of it; `whole` is ‖ΔW‖ of all blocks, or infinite where nobody knows.
        """
        name = self.span.placed.name
        with self.lock:
            self.squared += norm * norm
            self.changed += change * change
            self.rows_left -= rows
            if nonfinite:
                self.totals.nonfinite[name] = self.totals.nonfinite.get(name, 0) + nonfinite
            if not self.rows_left and self.span.edits:
                self.totals.weight_norm[name] = self.squared**0.5
                self.totals.delta_norm[name] = whole if math.isfinite(whole) else self.changed**0.5


@dataclass(frozen=True)
class LoadedEdit:
    """An edit with its factors in memory, or a replacement whose rows are read as they are needed."""

    edit: Edit
    update: Update
    strength: float
    parts: tuple[tuple[LowRank, float], ...] = ()  # what a low-rank `update` was stacked of, with strengths
    members: tuple[Edit, ...] = ()  # whose those are

    def alone(self) -> Iterator[tuple[Edit, Update, float]]:
        """Each edit with its own update and strength."""
        if self.parts:
            yield from ((edit, *part) for edit, part in zip(self.members, self.parts, strict=True))
        else:
            yield self.edit, self.update, self.strength

    def apply(self, block: torch.Tensor, first_row: int, base: torch.Tensor) -> None:
        """Change what this edit covers of `block`, which begins at `first_row` of the weight."""
        start = max(first_row, self.edit.first_row)
        stop = min(first_row + block.shape[0], self.edit.first_row + self.edit.rows)
        if start >= stop:
            return
        rows = block[start - first_row : stop - first_row, self.edit.columns]
        unmerged = base[start - first_row : stop - first_row, self.edit.columns]
        own = start - self.edit.first_row + self.edit.update_row
        if isinstance(self.update, Replace):
            part = load_rows(self.update, own, stop - start, block.device, block.dtype)
            part.add_rows(rows, 0, 1.0, unmerged)
        else:
            self.update.add_rows(rows, own, self.strength, unmerged)

    def at(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The change of single elements of the weight, in float64; for low-rank edits."""
        start, step = self.edit.columns.start or 0, self.edit.columns.step or 1
        own = (rows - self.edit.first_row).clamp(0, self.edit.rows - 1)
        width = math.prod(self.update.shape[1:]) if self.edit.columns != ALL else None
        across = ((columns - start) // step).clamp(0, None if width is None else width - 1)
        inside = (own == rows - self.edit.first_row) & (across * step + start == columns)
        change = own.double() * 0
        for update, strength in self.parts:
            change += update.elements(own + self.edit.update_row, across) * strength
        return change * inside


@dataclass(frozen=True)
class LoadedEdits:
    """All edits of one span on one device."""

    edits: tuple[LoadedEdit, ...]
    norm: float  # ‖ΔW‖ of all of them; no element changes by more; infinite where that depends on the weight
    cancelling: float  # values smaller than this may be what is left where W and ΔW cancel; 0 for none
    dtype: torch.dtype  # that is computed in

    @property
    def look_at_base(self) -> bool:
        return any(edit.update.looks_at_base for edit in self.edits)

    @property
    def is_bound(self) -> bool:
        """Whether `norm` is no more than a bound of ‖ΔW‖ here: of several edits, or of one that goes on elsewhere."""
        return not math.isfinite(self.norm) or len(self.edits) != 1 or self.edits[0].edit.shared


def load_edits(span: Span, shelf: Shelf, device: torch.device, dtype: torch.dtype) -> LoadedEdits:
    """Read the factors; all low-rank edits of the same place become one product."""
    import torch

    result: list[LoadedEdit] = []
    groups: dict[tuple[object, ...], list[tuple[Edit, LowRank, float]]] = {}

    def close_groups() -> None:
        for group in groups.values():
            parts = tuple((update, strength) for _, update, strength in group)
            result.append(LoadedEdit(group[0][0], stack(parts), 1.0, parts, tuple(edit for edit, _, _ in group)))
        groups.clear()

    for edit in span.edits:
        if isinstance(edit.update, Replace):
            close_groups()
            result.append(LoadedEdit(edit, edit.update, 1.0))
            continue
        update = shelf.load(edit.update, device, dtype) if edit.shared else load_update(edit.update, device, dtype)
        if update.needs_weight:
            update = update.prepared(partial(weight_rows, span, edit, device, dtype))
        if isinstance(update, LowRank):
            place = (edit.first_row, edit.rows, edit.update_row, str(edit.columns))
            groups.setdefault(place, []).append((edit, update, edit.strength))
        else:  # what adds up may be done together, in any order; others wait for what came before
            close_groups()
            result.append(LoadedEdit(edit, update, edit.strength))
    close_groups()
    if device.type == "cuda":  # the factors must be complete for the streams of other workers too
        torch.cuda.current_stream(device).synchronize()
    norm = sum(edit.update.norm() * abs(edit.strength) for edit in result)
    rounded = torch.finfo(getattr(torch, FLOAT_NAMES[span.placed.dtype]))
    cancelling = 0.0
    if rounded.bits == 16 and 0 < norm < float("inf") and all(edit.parts for edit in result):
        cancelling = norm / (span.rows * span.width) ** 0.5 * 2**-16 / rounded.eps
    return LoadedEdits(tuple(result), norm, cancelling, dtype)


def has_effect(edit: LoadedEdit, block: torch.Tensor, first: int, compute: torch.dtype, rounded: torch.dtype) -> bool:
    """Whether an edit by itself gives any element of a block another value, after rounding.

    `block` holds rows from `first` on as they are stored. More of it is looked at only as long as nothing changes.
    """
    import torch

    at, count = 0, max(1, LOOKED_AT_FIRST // block.shape[1])
    while at < block.shape[0]:
        before = block[at : at + count].to(compute)
        after = before.clone()
        edit.apply(after, first + at, before)
        if not torch.equal(before.to(rounded).nan_to_num(), after.to(rounded).nan_to_num()):
            return True
        at, count = at + count, min(4 * count, max(1, LOOKED_AT // block.shape[1]))
    return False


def weight_rows(span: Span, edit: Edit, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows that an edit covers as no update but a replacement has left them, block by block."""
    import torch

    stored = getattr(torch, FLOAT_NAMES[span.weight.exact])
    step = max(1, READ_AT_ONCE // (span.width * stored.itemsize))
    before = [
        LoadedEdit(
            other, other.update if isinstance(other.update, Replace) else load_update(other.update, device, dtype), 1
        )
        for other in span.edits
        if other.update.replaces
    ]
    with OpenSources() as sources:
        for first in range(edit.first_row, edit.first_row + edit.rows, step):
            count = min(step, edit.first_row + edit.rows - first)
            block = span.matrix.rows(first, count, device, stored, Room(sources)).to(dtype)
            for replacement in before:
                replacement.apply(block, first, block)
            yield first - edit.first_row + edit.update_row, block[:, edit.columns]


class Worker:
    """One thread's buffers on one device. On CUDA the host's buffer is pinned, and a block's bytes go through it."""

    def __init__(self, device: str, raw_bytes: int, elements: int, wide: bool) -> None:
        import torch

        self.torch = torch
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.outgoing = pages_of(torch.empty(raw_bytes + 2 * PAGE, dtype=torch.uint8, pin_memory=on_gpu))
        # on CUDA a block has left the host's memory before its result comes there
        self.host = self.outgoing if on_gpu else torch.empty(raw_bytes, dtype=torch.uint8)
        self.twin = torch.empty(raw_bytes, dtype=torch.uint8, device=self.device) if on_gpu else None
        self.scratch = torch.empty(elements * (8 if wide else 4), dtype=torch.uint8, device=self.device)
        self.merged = torch.empty(raw_bytes, dtype=torch.uint8, device=self.device)
        if not on_gpu:
            import numpy

            self.sizes, self.small = numpy.empty(LOOKED_AT, numpy.uint16), numpy.empty(LOOKED_AT, numpy.bool_)
            torch.set_num_threads(1)  # workers are the parallelism

    def merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        """Rows `first` … `first + count` of a span as they are in the output.

        What comes back holds them from byte `shift` on, and begins with a page; the next call overwrites it.
        """
        with self.torch.inference_mode(), self.torch.cuda.stream(self.stream):
            return self._merged_rows(work, first, count, sources, shift)

    def _merged_rows(self, work: EditedSpan, first: int, count: int, sources: OpenSources, shift: int) -> memoryview:
        torch, span = self.torch, work.span
        width = span.width
        stored, rounded = (getattr(torch, FLOAT_NAMES[name]) for name in (span.weight.exact, span.placed.dtype))
        compute = torch.float64 if stored == torch.float64 else torch.float32
        written = count * width * rounded.itemsize

        before = span.matrix.rows(first, count, self.device, stored, Room(sources, self.host, self.twin))
        block = self.scratch[: count * width * compute.itemsize].view(compute).view(count, width)
        ready = self.outgoing[shift : shift + written]
        in_place = self.stream is None and shift % rounded.itemsize == 0
        after = (ready if in_place else self.merged[:written]).view(rounded).view(count, width)

        block.copy_(before)
        norm = torch.linalg.vector_norm(block)
        loaded = work.edits_on(self.device, compute)
        replaced = sum(edit.update.replaces for edit in loaded.edits)  # they come first
        for edit in loaded.edits[:replaced]:
            edit.apply(block, first, block)
        base = block.clone() if loaded.look_at_base else block
        for edit in loaded.edits[replaced:]:
            edit.apply(block, first, base)
        after.copy_(block)
        if loaded.cancelling:
            self.settle(before, after, loaded, first)
        if not work.totals.changed and loaded.edits and not same_bits(before.to(rounded), after):
            work.totals.changed = True  # never set to False: another worker may have seen a change meanwhile
        if work.waiting:
            work.look_for_effects(loaded, before, first, rounded)
        if not in_place:
            ready.copy_(self.merged[:written], non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()
        base_norm, nonfinite = float(norm), 0
        measured = loaded.is_bound and not replaced
        change = float(torch.linalg.vector_norm(block.sub_(before))) if measured else 0.0
        if not base_norm + loaded.norm <= torch.finfo(rounded).max:  # else |w + δ| ≤ ‖W‖ + ‖ΔW‖ fits
            nonfinite = check_finite(span, before, after)
        # before the bytes go: a file whose bytes are all there is recorded with what was seen of it
        work.seen(count, base_norm, change, math.inf if measured or replaced else loaded.norm, nonfinite)
        return self.outgoing[: shift + written].numpy().data

    def settle(self, before: torch.Tensor, after: torch.Tensor, loaded: LoadedEdits, first_row: int) -> None:
        """Recompute in float64 the few values where W and ΔW cancel.

        There the float32 sum has lost the digits that the result is made of; everywhere else its
        error is far below half a step of a 16-bit dtype.
        """
        width, before, after = after.shape[1], before.flatten(), after.flatten()
        found = self.near_zero(after, loaded.cancelling)
        found = found[before[found] != 0]  # where W is zero nothing cancels, and there may be many
        for places in self.torch.split(found, SETTLED_TOGETHER):
            rows, columns = places // width, places % width
            exact = before[places].double()
            for edit in loaded.edits:
                exact += edit.at(first_row + rows, columns)
            after[places] = exact.to(after.dtype)

    def near_zero(self, values: torch.Tensor, limit: float) -> torch.Tensor:
        """Positions of the elements of a flat 16-bit `values` whose size is below `limit`."""
        import torch

        if self.stream is not None:
            return torch.nonzero(values.abs() < limit).flatten()
        import numpy  # does this ten times faster than torch on a CPU

        bits = values.view(torch.int16).numpy().view(numpy.uint16)
        highest = int(torch.tensor(limit, dtype=values.dtype).view(torch.int16)) << 1
        found = []
        for start in range(0, bits.size, LOOKED_AT):  # a piece at a time stays in the cache
            piece = bits[start : start + LOOKED_AT]
            small = self.small[: piece.size]
            numpy.add(piece, piece, out=self.sizes[: piece.size])  # without the sign
            numpy.less(self.sizes[: piece.size], highest, out=small)
            if piece.size % 8 == 0:  # few are small: look at eight at a time
                eights = numpy.flatnonzero(small.view(numpy.uint64) != 0)[:, None] * 8 + numpy.arange(8)
                places = eights[small[eights]]
            else:
                places = numpy.flatnonzero(small)
            found.append(places + start)
        return torch.from_numpy(numpy.concatenate(found))


def pages_of(memory: torch.Tensor) -> torch.Tensor:
    """`memory` from its first whole page on."""
    return memory[-memory.data_ptr() % PAGE :]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


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
