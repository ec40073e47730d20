"""A stretch of work on factors: the device, the precision, what it cost, and how many layers go at a time."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.adapters.writer import described
from loratool.algebra.lowrank.products import working_dtype
from loratool.devices import check_device, exact_arithmetic, start_torch
from loratool.errors import LoratoolError
from loratool.files.process import cores, peak_memory
from loratool.results.base import Cost

if TYPE_CHECKING:
    import torch

    from loratool.adapters.layers import Contents, Layer

Item = TypeVar("Item")
Result = TypeVar("Result")
PathLike = str | os.PathLike[str]  # what every path argument takes
Progress = Callable[[int, int], None]
CPU_BATCH = 1 << 20  # bytes of factors in float64 that are decomposed at a time
CUDA_BATCH = 1 << 30
MOST_WORKERS = 8  # on a CPU; each holds the factors of a batch


@dataclass(frozen=True)
class Session:
    """Torch and a device, ready to work on the factors of some adapters."""

    device: torch.device
    dtype: torch.dtype  # to compute in
    startup_seconds: float
    origins: tuple[dict[str, Any], ...]  # the adapters, as provenance names them

    @property
    def workers(self) -> int:
        return min(cores(), MOST_WORKERS) if self.device.type == "cpu" else 1

    def spread(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of all items in their order. On a CPU several threads work, each with one of its own.

        Many small decompositions in threads of one core each are quicker than one after the other on all cores, and
        far quicker on a machine that is busy: a library's threads wait for each other at every step.
        """
        import torch

        if self.workers == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(self.workers, "loratool-work", torch.set_num_threads, (1,)) as pool:
            ahead: deque[Any] = deque()  # `pool.map` would take all items at once, before Python 3.14
            try:
                for item in items:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) > self.workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def through(
        self,
        work: Callable[[Item], Iterable[Result]],
        items: Iterable[Item],
        count: int,
        progress: Progress | None,
        first: Iterable[Item] = (),
    ) -> Iterator[Result]:
        """What `work` finds in every item, in their order; all threads work together on each of those that come `first`.

        `progress` is called with the number of results that were taken, of `count` that are expected.
        """
        done = 0
        for found in chain(map(work, first), self.spread(work, items)):
            for each in found:
                yield each
                done += 1
            if progress:
                progress(done, max(done, count))

    def told(self, started: float) -> dict[str, Any]:
        """What every report tells of the work that began at `started`."""
        return {"cost": Cost(str(self.device), time.monotonic() - started, self.startup_seconds, peak_memory())}


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
