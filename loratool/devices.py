"""Torch, ready on the devices that are asked for."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.errors import UsageError, printable
from loratool.files import process, stopwatch
from loratool.files.stopwatch import lap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

RUNTIME_MEMORY = 256 << 20  # bytes: Python, torch and its libraries, before any work


def kind_of(devices: Sequence[str]) -> str:
    """The kind of device that edited weights are computed on."""
    return "cpu" if devices[0] == "cpu" else "cuda"


@dataclass(frozen=True)
class Runtime:
    """Torch, ready to work."""

    devices: tuple[str, ...]
    seconds: float  # that the import and the devices took
    watch: stopwatch.Stopwatch  # of the thread that did it


def start_torch(device: str) -> Future[Runtime]:
    """Import torch and wake `device` in the background: that takes seconds in which bytes can be copied."""
    from concurrent.futures import Future

    future: Future[Runtime] = Future()

    def load() -> None:
        started = time.monotonic()
        collecting = gc.isenabled()
        gc.disable()  # the import makes a million objects that all stay
        try:
            watch = stopwatch.begin("torch")
            devices = find_devices(device)
            lap("start-up")
            future.set_result(Runtime(devices, time.monotonic() - started, watch))
        except BaseException as error:
            future.set_exception(error)
        finally:
            if collecting:
                gc.enable()

    threading.Thread(target=load, name="loratool-torch", daemon=True).start()
    return future


def check_device(device: str) -> None:
    """Raise `UsageError` where `device` is no name of one."""
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N (got {printable(repr(device))})")


def find_devices(device: str) -> tuple[str, ...]:
    """The devices that "auto", "cpu", "cuda" or "cuda:N" mean here, each ready for work."""
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
    if device.startswith("cuda:") and device not in every:
        raise UsageError(f"--device {printable(device)}: no such device; available: {', '.join(every)}")
    devices = (device,) if device.startswith("cuda:") else every
    for name in devices:
        torch.zeros(1, device=name)
    return devices


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


def resident_memory() -> int:
    """Bytes of this process in memory now, or what they are likely to be."""
    return process.resident_memory() or RUNTIME_MEMORY
