"""What operating systems do differently with processes: memory, cores, signals and standard streams.

psutil would be one more package to install, for two numbers.
"""

from __future__ import annotations

import codecs
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

from loratool.files import system
from loratool.files.crew import in_threads

Item = TypeVar("Item")
Found = TypeVar("Found")

resource = system.optional("resource")

OPENBLAS_THREADS = "OPENBLAS_NUM_THREADS"
# glibc's allocator: parameters of `mallopt`, their names in the environment, and values
HEAP_RULES = (
    (-8, "MALLOC_ARENA_MAX", 4),  # heaps
    (-3, "MALLOC_MMAP_THRESHOLD_", 32 << 20),  # bytes from which on memory is no part of a heap; glibc takes no more
    (-1, "MALLOC_TRIM_THRESHOLD_", 64 << 20),  # free bytes at the end of a heap that are not given back
)
STATUS = Path("/proc/self")  # where the kernel tells what it knows of this process
GPUS = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")  # of drivers, where there is one
# ru_maxrss is in KiB, but on kernels that count bytes; those have a clock of this name
MAXRSS_UNIT = 1 if hasattr(time, "CLOCK_UPTIME_RAW") else 1024  # bytes

# What a console prints in the place of a character that it lacks: one for one, so that columns stay in line.
SPELLED_PLAINLY = "loratool-plain"  # the name of the error handler that does it
PLAIN = dict(
    zip(
        "‖ΔαβσΣλ→←−–—⊙⊗√ᵀ₀₁₂⁻²³⁶≤≥≈⟨⟩×·±µ│─├└┘┐┤┬░▒▓█…“”‘’",
        "|dabsSl><---*@vT012-236<>~<>x*~u|-+`'.++.:##.\"\"''",
        strict=True,
    )
)


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    try:
        return int((STATUS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def share_heaps() -> None:
    """Have the threads that begin from now on share a few heaps, where the allocator can be asked to (glibc's can).

    Each heap keeps free memory that only its own threads take again, and by default each thread gets one. What a row block
    needs for a moment is not given back after it: the kernel would have to clear the same pages again for the next one.
    """
    ctypes = system.optional("ctypes")
    if ctypes is not None:
        with suppress(AttributeError, OSError, TypeError):  # another allocator, or another system
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, name, value in HEAP_RULES:
                if name not in os.environ:
                    mallopt(parameter, value)


def multiply_on_own_threads() -> None:
    """Have OpenBLAS start no threads when numpy is imported, unless somebody has said how many.

    As many threads as there are cores compute already. Those of OpenBLAS would wait for work on the same cores, and
    products would have to be cut into pieces that are too small for them.
    """
    if not {OPENBLAS_THREADS, "OMP_NUM_THREADS"} & os.environ.keys():
        os.environ[OPENBLAS_THREADS] = "1"


def multiplies_alone() -> bool:
    """Whether OpenBLAS has no threads but those that call it."""
    return (os.environ.get(OPENBLAS_THREADS) or os.environ.get("OMP_NUM_THREADS")) == "1"


def peak_memory() -> int:
    """The largest resident set that this process has had, in bytes; 0 where the system does not tell."""
    with suppress(OSError):  # the kernel's own mark: getrusage also counts the process that started this one
        for line in (STATUS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is not None:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * MAXRSS_UNIT
    system.do_without("this system does not report process memory; peak memory is reported as 0")
    return 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """What `function` makes of each item, in their order; by threads, as many as cores, where there are several.

    After an error no other item is begun.
    """
    every = list(items)
    if len(every) < 2:
        return [*map(function, every)]
    found: dict[int, Found] = {}
    left, stop = iter(enumerate(every)), threading.Event()

    def work(_: int) -> None:
        for number, item in left:  # which is not written in Python, so that threads may take turns at it
            if stop.is_set():
                return
            found[number] = function(item)

    in_threads(work, min(cores(), len(every)), stop)
    return [found[number] for number in range(len(every))]


def has_no_gpu() -> bool:
    """Whether this machine has no GPU that torch could use, for sure: False where the system does not tell."""
    return os.path.isdir("/dev") and not any(map(os.path.exists, GPUS))


def host_name() -> str:
    """The name of this machine, as others may know it."""
    import socket  # here, so that help does not wait for it

    return socket.gethostname() or "unknown"


def is_running(pid: int) -> bool:
    """Whether a process is there on this machine; True where the system does not tell."""
    if not hasattr(os, "getpgid"):  # elsewhere `os.kill` may end it
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def on_stop(handle: Callable[[bool], None]) -> None:
    """Call `handle` when this process is asked to stop: with True where it is asked to terminate, with False on Ctrl-C.

    A second request ends the process there and then, whatever it is doing. Requests that are ignored, as under nohup,
    stay so.
    """

    def asked(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        handle(number != signal.SIGINT)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, asked)


def plainly(error: UnicodeError) -> tuple[str, int]:
    """What a console prints for characters that it lacks: |dW| for ‖ΔW‖."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


codecs.register_error(SPELLED_PLAINLY, plainly)


def prepare_streams() -> None:
    """Make stdout and stderr fit to be written to.

    Streams that are closed get the null device; else the next file opened would get their number. Consoles with a small
    character set get the nearest characters that they have, as wide, and a question mark where there is none.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        small = "utf" not in (getattr(stream, "encoding", None) or "utf").lower()
        if small and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SPELLED_PLAINLY)


@contextmanager
def without_collections() -> Iterator[None]:
    """Look for no garbage meanwhile: of many objects that all stay, the collector looks at each several times.

    Afterwards they count as old, so that it does not begin with all of them.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else somebody wants some objects to stay frozen
            gc.freeze()
            gc.unfreeze()  # which makes all of them old, in no time
        if collecting:
            gc.enable()


def is_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more; True where the system does not tell."""
    try:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError):  # Windows
        return True


def silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere, for stdout is closed or full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
