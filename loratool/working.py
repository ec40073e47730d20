"""A stretch of work on factors: the device, the precision, what it cost, and how many layers go at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.errors import LoratoolError
from loratool.lowrank import working_dtype
from loratool.resources import check_device, exact_arithmetic, peak_memory, start_torch
from loratool.saving import described

if TYPE_CHECKING:
    import torch

    from loratool.contents import Contents, Layer

PathLike = str | os.PathLike[str]  # what every path argument takes
Progress = Callable[[int, int], None]
CPU_BATCH = 32 << 20  # bytes of factors in float64 that are decomposed at a time
CUDA_BATCH = 1 << 30


@dataclass(frozen=True)
class Session:
    """Torch and a device, ready to work on the factors of some adapters."""

    device: torch.device
    dtype: torch.dtype  # to compute in
    startup_seconds: float
    origins: tuple[dict[str, Any], ...]  # the adapters, as provenance names them

    def told(self, started: float) -> dict[str, Any]:
        """What every report tells of the work that began at `started`."""
        return {
            "device": str(self.device),
            "seconds": time.monotonic() - started,
            "startup_seconds": self.startup_seconds,
            "peak_memory": peak_memory(),
        }


@contextmanager
def session(device: str, sources: Sequence[Contents]) -> Iterator[Session]:
    """Import torch and wake the device, hashing the adapters meanwhile."""
    check_device(device)
    runtime = start_torch(device)
    try:
        origins = tuple(described(source) for source in sources)
        ready = runtime.result()
        import torch

        place = torch.device(ready.devices[0])
        with exact_arithmetic():
            yield Session(place, working_dtype(place), ready.seconds, origins)
    except LoratoolError:
        runtime.exception()  # wait for the import: a process that ends in the middle of it may crash
        raise


@dataclass(frozen=True)
class Batch:
    """Layers of one form and rank, worked on together."""

    targets: tuple[str, ...]


def batches(layers: Mapping[str, Layer], device: torch.device) -> Iterator[Batch]:
    """All layers, those that can be stacked together, as many as a batch may hold."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for target, layer in layers.items():
        alike.setdefault((*layer.form, layer.rank), []).append(target)
    most = CUDA_BATCH if device.type == "cuda" else CPU_BATCH
    for targets in alike.values():
        layer = layers[targets[0]]
        count = max(1, most // max(1, 8 * layer.parameters * layer.rank))
        for at in range(0, len(targets), count):
            yield Batch(tuple(targets[at : at + count]))
