"""Torch, ready on the devices that are asked for."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import UsageError, printable
from loratool.files import process, stopwatch
from loratool.files.process import without_collections
from loratool.files.stopwatch import lap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

RUNTIME_MEMORY = 256 << 20  # bytes: Python, torch and its libraries, before any work
CUDA_LIBRARIES = 260 << 20  # bytes that those of a torch built for CUDA take besides, whatever computes


def kind_of(devices: Sequence[str]) -> str:
    """The kind of device that edited weights are computed on; all of `devices` are of one kind."""
    return devices[0].partition(":")[0]


@dataclass(frozen=True)
class Runtime:
    """The devices, ready to work, and torch with them."""

    devices: tuple[str, ...]
    seconds: float  # that the import and the devices took
    watch: stopwatch.Stopwatch  # of the thread that did it
    has_torch: bool = True


def start_torch(device: str) -> Future[Runtime]:
    """Import torch and wake `device` in the background: that takes seconds in which bytes can be copied."""
    from concurrent.futures import Future

    future: Future[Runtime] = Future()

    def load() -> None:
        started = time.monotonic()
        try:
            with without_collections():  # the import makes a million objects
                watch = stopwatch.begin("torch")
                devices = find_devices(device)
                lap("start-up")
            future.set_result(Runtime(devices, time.monotonic() - started, watch))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=load, name="loratool-torch", daemon=True).start()
    return future


def without_torch() -> Future[Runtime]:
    """The CPU, and no torch: for copies, and for what numpy can compute."""
    from concurrent.futures import Future

    future: Future[Runtime] = Future()
    future.set_result(cpu_alone())
    return future


def cpu_alone() -> Runtime:
    """The CPU, where nothing needs torch."""
    return Runtime(("cpu",), 0.0, stopwatch.Stopwatch("torch"), has_torch=False)


class Awaited:
    """Torch on the requested devices, on its way from the first need of it on."""

    def __init__(self, device: str) -> None:
        self.device, self.lock = device, threading.Lock()
        self.future: Future[Runtime] | None = None

    def start(self) -> Future[Runtime]:
        with self.lock:
            if self.future is None:
                self.future = start_torch(self.device)
            return self.future

    def used(self) -> Runtime:
        """What was started: the CPU alone where nothing needed torch."""
        return self.future.result() if self.future else cpu_alone()


def means_cpu(device: str) -> bool:
    """Whether `device` is the CPU for sure, told without torch."""
    return device == "cpu" or (device == "auto" and process.has_no_gpu())


def find_devices(device: str) -> tuple[str, ...]:
    """The devices that "auto", "cpu", "cuda" or a list of "cuda:N" mean here, each ready for work."""
    import torch

    if device == "cpu":
        return ("cpu",)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and device == "auto":  # a driver may be there and every device hidden
        return ("cpu",)
    if not count:
        raise UsageError(
            f"--device {printable(device)}: torch {torch.__version__} finds no CUDA device on this machine"
        )
    every = tuple(f"cuda:{n}" for n in range(count))
    devices = tuple(device.split(",")) if device.startswith("cuda:") else every
    if missing := [name for name in devices if name not in every]:
        raise UsageError(f"--device {printable(missing[0])}: no such device; available: {', '.join(every)}")
    for name in devices:
        torch.zeros(1, device=name)
    return devices


def free_memory(devices: Sequence[str]) -> float:
    """Bytes that are free on the fullest of some GPUs; without a limit where torch has found none, as for an estimate."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return inf
    return float(min(torch.cuda.mem_get_info(name)[0] for name in devices))


def load_linear_algebra(devices: Sequence[str]) -> None:
    """Load what decompositions need on GPUs, before several threads ask for it.

    Torch loads it at the first call, and two first calls at the same time fail: "lazy wrapper should be called at most
    once" (pytorch issue 90613).
    """
    import torch

    if kind_of(devices) == "cuda":
        torch.linalg.inv(torch.ones(1, 1, device=devices[0]))


@dataclass
class Precision:
    """What torch's settings were before the first of those who compute changed them."""

    lock: threading.Lock
    users: int = 0
    before: str = ""
    threads: int = 0


PRECISION = Precision(threading.Lock())


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 products in full float32, without TF32, for as long as this lasts.

    The setting is one for the whole process: the last of several who compute at the same time gives it back.
    """
    import torch

    with PRECISION.lock:
        if not PRECISION.users:
            PRECISION.before, PRECISION.threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        PRECISION.users += 1
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with PRECISION.lock:
            PRECISION.users -= 1
            if not PRECISION.users:
                torch.set_float32_matmul_precision(PRECISION.before)
                torch.set_num_threads(PRECISION.threads)  # workers set it to 1


def runtime_memory() -> int:
    """Bytes of Python, torch and its libraries before any work on a CPU, told without importing torch."""
    found = find_spec("torch")
    folder = Path(found.origin).parent if found and found.origin else Path()
    return RUNTIME_MEMORY + (CUDA_LIBRARIES if (folder / "lib" / "libtorch_cuda.so").exists() else 0)


def has_torch() -> bool:
    """Whether torch has been imported."""
    return "torch" in sys.modules


def resident_memory() -> int:
    """Bytes of this process in memory now, or what they are likely to be."""
    return process.resident_memory() or RUNTIME_MEMORY
