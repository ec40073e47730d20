"""What a merge may use: devices, workers and the size of a block, within a memory limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapters.adapter import stored_tensors
from loratool.algebra.updates.replacing import Replace
from loratool.bases.packed import Packed
from loratool.devices import (
    RUNTIME_MEMORY,
    Runtime,
    free_memory,
    kind_of,
    means_cpu,
    resident_memory,
    runtime_memory,
    start_torch,
    without_torch,
)
from loratool.errors import UsageError
from loratool.files.process import cores
from loratool.files.sink import COPY_PIECE, PAGE
from loratool.files.stand_ins import stand_in
from loratool.merging import numpy_sums
from loratool.merging.compensating import memory_for
from loratool.merging.numpy_sums import suits
from loratool.merging.shared_updates import MOST_KEPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

    from loratool.bases.edits import Edit
    from loratool.merging.options import RunOptions
    from loratool.merging.output_layout import Span

CPU_BLOCK = 3 << 20  # bytes of weight: near a core's cache
NUMPY_BLOCKS = 4  # of those at a time where numpy computes, whose tiles are smaller: a block costs calls and a write
FEW_WORKERS = 4  # more of them take
FEW_ELEMENTS = 3 << 29  # which numpy has computed by the time that torch is imported and has computed them
NUMPY_WORKERS = 6  # more of them wait for the interpreter's lock, whatever the number of cores
LARGE_BLOCK = 6 << 20  # bytes, so that they wait less for the interpreter's lock
# bytes of weight: hides the latency of a transfer. Pinned memory comes in powers of two, and a block has pages around it
CUDA_BLOCK = (16 << 20) - 2 * PAGE
# the same of packed weights: to decode a block takes many calls, between which threads wait for the interpreter's lock
PACKED_CUDA_BLOCK = (64 << 20) - 2 * PAGE
PACKED_CUDA_MEMORY = 8  # bytes on the device for each of these
SMALLEST_BLOCK = 64 << 10
TILE = 1 << 17  # elements that are computed at a time on a CPU: they stay in a core's cache
CUDA_TILE = 1 << 22  # on a GPU, in float64
FORMULA_BLOCK = 1 << 18  # elements of a block that no sum of products changes: whatever a merge may use, for sums in
# another order give other last bits
FORMULA_MEMORY = 80  # bytes of such an element while it is computed, in float64 with copies
WAITING_WORKERS = 2  # for the disk, at any time
MOST_WORKERS = 16
GPU_WORKERS = 12  # per GPU: most of them hash and write; more of them wait for each other
CUDA_MEMORY = 600 << 20  # bytes of host memory that the CUDA libraries take besides
CUDA_WORKING_MEMORY = 512 << 20  # bytes of host memory that kernels take when they first run
NUMPY_MEMORY = 64 << 20  # bytes: Python, numpy and its libraries, before any work
WORKING_MEMORY = 32 << 20  # bytes: hashing, small files and the libraries' own buffers


@dataclass(frozen=True)
class Resources:
    """What a merge may use."""

    devices: tuple[str, ...]  # "cpu", or one or more of "cuda:0", …
    workers: int
    block: int  # bytes of weight that pass at a time, at least one row
    max_memory: int | None = None  # the limit that they keep within
    has_torch: bool = True  # without it numpy computes

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def kind(self) -> str:
        """The kind of device."""
        return kind_of(self.devices)

    def memory(self, spans: Sequence[Span], sent: int = 0) -> int:
        """Bytes of host memory that work on some spans takes besides what Python and its libraries take.

        `sent` are bytes that each worker may hold of what it sends elsewhere.
        """
        touched = [span for span in spans if not span.untouched]
        buffers = max(map(self.buffer_memory, touched), default=0)
        kept = WORKING_MEMORY + (CUDA_WORKING_MEMORY if self.on_gpu else 0)
        each = COPY_PIECE + buffers + read_ahead(spans) + correcting_memory(touched) + sent
        return kept + self.workers * each + factor_memory(touched, self.workers)

    def buffer_memory(self, span: Span) -> int:
        """Bytes of one worker's host buffers: the raw block, and on the CPU the merged block, what it is computed in, and held.

        The merged block counts twice: at an odd byte of the file it takes a step in between. Numpy has the merged one alone.
        """
        raw = rows_of_block(span, self.block) * span.width * itemsize(span)
        if self.on_gpu:
            return raw
        held = span.weight.memory if isinstance(span.weight, Packed) else 0
        if not self.has_torch:
            return held + raw + numpy_sums.TILE * 20
        if not sums_products(span):
            return held + 3 * raw + FORMULA_MEMORY * (raw // itemsize(span))
        return held + 3 * raw + tile_elements(span, self.block, on_gpu=False) * (21 if needs_float64(span) else 13)


def runtime_for(spans: Sequence[Span], options: RunOptions) -> Future[Runtime]:
    """Torch on its way in the background, and not at all where `needs_torch` does not say so."""
    return start_torch(options.device) if needs_torch(spans, options.device, options.max_memory) else without_torch()


def needs_torch(spans: Sequence[Span], device: str, max_memory: int | None) -> bool:
    """Whether any span is neither a copy nor computed by numpy."""
    computed = [span for span in spans if not span.carried]
    return bool(computed) and not by_numpy(computed, device, max_memory)


def by_numpy(spans: Sequence[Span], device: str, max_memory: int | None = None) -> bool:
    """Whether numpy computes some spans: it can, and is not slower by what its threads wait for each other.

    It does in any case where a limit would leave torch fewer threads than numpy has use for.
    """
    if not means_cpu(device) or not all(map(suits, spans)):
        return False
    workers = most_workers()
    few = workers <= FEW_WORKERS or sum(span.placed.elements for span in spans) <= FEW_ELEMENTS
    useful = min(workers, NUMPY_WORKERS)
    return few or (
        max_memory is not None
        and max_memory < runtime_memory() + Resources(("cpu",), useful, LARGE_BLOCK).memory(spans)
    )


def choose_resources(
    spans: Sequence[Span],
    devices: tuple[str, ...],
    workers: int | None,
    max_memory: int | None,
    used: int,
    sent: int = 0,
    has_torch: bool = True,
) -> Resources:
    """Workers and block size that keep the process within `max_memory` bytes, of which `used` are gone.

    `sent` are bytes that each worker may hold of what it sends elsewhere. Without torch, numpy computes.
    Raises `UsageError` with the smallest limit that would do.
    """
    used = max(used, NUMPY_MEMORY)  # which may not have been imported so far
    if kind_of(devices) == "cuda":
        most = workers or min(cores(), GPU_WORKERS * len(devices))
        packed = any(isinstance(span.weight, Packed) for span in spans if not span.untouched)
        on_device = PACKED_CUDA_MEMORY * PACKED_CUDA_BLOCK * -(-most // len(devices))
        block = PACKED_CUDA_BLOCK if packed and 4 * on_device <= free_memory(devices) else CUDA_BLOCK
    elif has_torch:
        most = workers or most_workers()
        block = CPU_BLOCK if most <= FEW_WORKERS else LARGE_BLOCK
    else:
        most, block = workers or min(most_workers(), NUMPY_WORKERS), NUMPY_BLOCKS * CPU_BLOCK
    chosen = Resources(devices, most, block, max_memory, has_torch)
    while max_memory is not None and (needed := used + chosen.memory(spans, sent)) > max_memory:
        if chosen.block > SMALLEST_BLOCK:
            chosen = replace(chosen, block=chosen.block // 2)
        elif chosen.workers > 1:
            chosen = replace(chosen, workers=chosen.workers - 1)
        else:
            least = -(-needed // 10**6)
            raise UsageError(
                f"--max-memory: {max_memory / 10**6:g} MB is too little; this merge needs at least {least} MB",
                hint=f"--max-memory {least}MB",
            )
    return chosen


def check_limit(spans: Sequence[Span], runtime: Runtime, options: RunOptions, sent: int = 0) -> None:
    """Raise `UsageError` where a limit leaves no room for what is to be computed."""
    workers, limit, used = options.threads, options.max_memory, resident_memory()
    choose_resources(spans, runtime.devices, workers, limit, used, sent, runtime.has_torch)


def estimated_memory(spans: Sequence[Span], device: str, workers: int | None, max_memory: int | None) -> int:
    """Bytes that a merge is expected to keep resident, told without importing torch."""
    on_gpu = device.startswith("cuda")
    devices = tuple(device.split(",")) if on_gpu else ("cpu",)
    has_torch = needs_torch(spans, device, max_memory)
    of_torch = RUNTIME_MEMORY + CUDA_MEMORY if on_gpu else runtime_memory()
    used = of_torch if has_torch else NUMPY_MEMORY
    chosen = choose_resources(spans, devices, workers, max_memory, used, has_torch=has_torch)
    return used + chosen.memory(spans)


def correcting_memory(spans: Iterable[Span]) -> int:
    """Bytes that a worker takes to correct updates; nothing where rounding does not ask for it."""
    edits = ((span, edit) for span in spans if span.rounding == "compensated" for edit in span.edits)
    return max((memory_for(edit.rows, span.width, edit.update.rank) for span, edit in edits), default=0)


def read_ahead(spans: Iterable[Span]) -> int:
    """Bytes that a worker holds of what it reads from elsewhere."""
    found = {tensor.file.path: stand_in(tensor.file.path) for span in spans for tensor in span.weight.tensors}
    return max((there.ahead for there in found.values() if there is not None), default=0)


def factor_memory(spans: Sequence[Span], workers: int) -> int:
    """Bytes of the factors that are loaded at a time, twice: as read and stacked.

    Each worker may be at another span, and of the updates that several spans share the last used ones stay loaded.
    """
    sizes = {id(e.update): update_memory(e, span) for span in spans for e in span.edits}
    most = workers * max((len(span.edits) for span in spans), default=0)
    if any(edit.shared for span in spans for edit in span.edits):
        most += MOST_KEPT
    return 2 * sum(sorted(sizes.values(), reverse=True)[:most])


def update_memory(edit: Edit, span: Span) -> int:
    """Bytes of one loaded update. A replacement has none: its rows are read as they are needed."""
    if isinstance(edit.update, Replace):
        return 0
    held = sum(tensor.info.elements for tensor in stored_tensors(edit.update))
    wide = span.weight.exact == "F64" or not sums_products(span)
    return max(held, edit.update.rank * (edit.rows + span.width)) * (8 if wide else 4)


def rows_of_block(span: Span, block: int) -> int:
    row = max(1, span.width * itemsize(span))
    if not sums_products(span):
        block = FORMULA_BLOCK * itemsize(span)
    return max(1, min(span.rows, block // row))


def sums_products(span: Span) -> bool:
    """Whether all that a span's edits add are sums of products, whose result does not depend on blocks."""
    return all(edit.update.replaces or edit.update.adds_products for edit in span.edits)


def tile_elements(span: Span, block: int, on_gpu: bool) -> int:
    """Elements of a block that are computed at a time."""
    most = CUDA_TILE if on_gpu else TILE
    return min(rows_of_block(span, block), max(1, most // max(1, span.width))) * span.width


def needs_float64(span: Span) -> bool:
    """Whether float32 is not enough to compute in."""
    return span.weight.exact == "F64" or itemsize_of(span.computed) != 2


def itemsize(span: Span) -> int:
    """Bytes of an element, as it is read or as it is written, whichever are more."""
    return max(map(itemsize_of, (span.weight.exact, span.computed)))


def itemsize_of(dtype: str) -> int:
    """Bytes of a number."""
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def most_workers() -> int:
    """Threads that keep the processor busy."""
    return min(cores() + WAITING_WORKERS, MOST_WORKERS)
