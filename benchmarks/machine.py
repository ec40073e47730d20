"""The machine that is measured on: what the numbers depend on, without names of hosts or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def describe(folder: Path, load: float) -> dict[str, str]:
    """What the numbers depend on; no names of hosts or folders."""
    facts = {
        "processor": f"{processor()}, {cores()} cores",
        "memory": f"{memory_line('MemTotal') / 2**30:.1f} GiB",
        "GPU": ", ".join(gpus()) or "none",
        "file system": filesystem(folder),
        "system": f"{platform.system()} {platform.release()}, {first_line(['cp', '--version'])}",
        "Python": platform.python_version(),
        "load before": f"{load:.2f}",
    }
    for package in ("torch", "peft", "transformers", "safetensors"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def processor() -> str:
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_line(name: str) -> int:
    """Bytes of one line of /proc/meminfo."""
    for line in read("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def available_memory() -> int:
    return memory_line("MemAvailable")


def gpus() -> list[str]:
    line = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return ["of NVIDIA" for _ in Path("/dev").glob("nvidia[0-9]*")]  # without nvidia-smi: as many as there are


def filesystem(folder: Path) -> str:
    return first_line(["df", "--output=fstype", str(folder)], number=1)


def first_line(words: list[str], number: int = 0) -> str:
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[number].strip()
    return "unknown"


def read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


@contextmanager
def gpu_memory_samples() -> Iterator[list[int]]:
    """Bytes in use on all GPUs together; the list is filled when the block ends, the first before it began."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    samples: list[int] = []
    count = gpus = 0
    with suppress(OSError, subprocess.CalledProcessError):
        before = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        gpus, count = len(before), sum(map(int, before))
    if not gpus:
        yield samples
        return
    watcher = subprocess.Popen([*words, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    try:
        yield samples
    finally:
        watcher.terminate()
        lines = [int(line) for line in watcher.communicate()[0].split() if line.isdigit()]
        rounds = [sum(lines[at : at + gpus]) for at in range(0, len(lines) - gpus + 1, gpus)]
        samples += [value << 20 for value in (count, *rounds)]
