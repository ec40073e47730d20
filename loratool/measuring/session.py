"""A stretch of work on factors: the devices, the precision, what it cost, and how many layers go at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.adapters.writer import described
from loratool.algebra.lowrank.products import working_dtype
from loratool.arguments import Progress
from loratool.devices import exact_arithmetic, kind_of, load_linear_algebra, start_torch
from loratool.errors import LoratoolError
from loratool.files.process import cores
from loratool.grouping import by_key
from loratool.options.shared import check_device
from loratool.results.base import Cost

if TYPE_CHECKING:
    import torch

    from loratool.adapters.layers import Contents, Layer

Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = tuple[str, ...]  # targets of layers of one form and rank, which are worked on together
Origins = tuple[dict[str, Any], ...]  # adapters, as provenance names them
CPU_BATCH = 1 << 20  # bytes of factors in float64 that are decomposed at a time
CUDA_BATCH = 1 << 30
MOST_WORKERS = 8  # on a CPU; each holds the factors of a batch


class Own(threading.local):
    """What a worker has for itself."""

    device: torch.device | None = None


@dataclass(frozen=True)
class Session:
    """Torch and some devices of one kind, ready to work on the factors of some adapters; for copies the CPU alone."""

    names: tuple[str, ...]  # of the devices
    has_torch: bool
    startup_seconds: float
    origins: Origins
    own: Own = field(default_factory=Own)

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        import torch

        return tuple(map(torch.device, self.names))

    @cached_property
    def dtype(self) -> torch.dtype:
        """To compute in."""
        return working_dtype(self.devices)

    @property
    def device(self) -> torch.device:
        """The device of the worker that asks, or the first one where no worker does."""
        return self.own.device or self.devices[0]

    @property
    def on_gpu(self) -> bool:
        return kind_of(self.names) == "cuda"

    @property
    def workers(self) -> int:
        """Threads: one for each core, or for each GPU."""
        return len(self.names) if self.on_gpu else max(len(self.names), min(cores(), MOST_WORKERS))

    def spread(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of all items in their order. Each worker takes the next item for its own device.

        Many small decompositions in threads of one core each are quicker than one after the other on all cores, and
        far quicker on a machine that is busy: a library's threads wait for each other at every step. One core each
        also makes results the same for any number of devices.
        """
        numbers = count()

        def begin() -> None:
            if not self.has_torch:
                return
            import torch

            torch.set_num_threads(1)
            self.own.device = self.devices[next(numbers) % len(self.devices)]

        with ThreadPoolExecutor(self.workers, "loratool-work", begin) as pool:
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
        expected: int,
        progress: Progress | None,
        first: Iterable[Item] = (),
    ) -> Iterator[Result]:
        """What `work` finds in every item, in their order; all cores work together on each of those that come `first`.

        GPUs share those too. `progress` is called with the number of results that were taken, of those `expected`.
        """
        together, dealt = ((), chain(first, items)) if self.on_gpu else (first, items)
        done = 0
        for found in chain(map(work, together), self.spread(work, dealt)):
            for each in found:
                yield each
                done += 1
            if progress:
                progress(done, max(done, expected))

    def told(self, started: float) -> dict[str, Any]:
        """What every report tells of the work that began at `started`."""
        return {"cost": Cost.since(started, ", ".join(self.names), self.startup_seconds)}


def hashing(sources: Sequence[Contents]) -> Future[Origins]:
    """The adapters, as provenance names them; their files are hashed for it, in the background."""
    pool = ThreadPoolExecutor(1, "loratool-hash")
    found = pool.submit(lambda: tuple(map(described, sources)))
    pool.shutdown(wait=False)
    return found


@contextmanager
def session(device: str, sources: Sequence[Contents], origins: Future[Origins] | None = None) -> Iterator[Session]:
    """Import torch and wake the devices, hashing the adapters meanwhile, unless they are `origins` already."""
    check_device(device)
    runtime = start_torch(device)
    try:
        known = origins.result() if origins is not None else tuple(map(described, sources))
        ready = runtime.result()
        load_linear_algebra(ready.devices)
        with exact_arithmetic():
            yield Session(ready.devices, True, ready.seconds, known)
    except LoratoolError:
        runtime.exception()  # wait for the import: a process that ends in the middle of it may crash
        raise


@contextmanager
def copying(origins: Future[Origins]) -> Iterator[Session]:
    """For what copies bytes and compares them: no torch, and as many threads as on the CPU."""
    yield Session(("cpu",), False, 0.0, origins.result())


def batches(layers: Mapping[str, Layer], device: torch.device) -> Iterator[Batch]:
    """All layers, those that can be stacked together, as many as a batch may hold."""
    alike = by_key(((*layer.form, layer.rank), target) for target, layer in layers.items())
    most = CUDA_BATCH if device.type == "cuda" else CPU_BATCH
    for targets in alike.values():
        layer = layers[targets[0]]
        count = max(1, most // max(1, 8 * layer.parameters * layer.rank))
        for at in range(0, len(targets), count):
            yield tuple(targets[at : at + count])
