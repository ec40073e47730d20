"""The machine that is measured on: what the numbers depend on, without names of hosts or folders."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT = "LORATOOL_COMMIT"  # names the commit of a tree that has no git
TORCH = """
import torch
settings = torch.__config__.show()
blas = settings.partition("BLAS_INFO=")[2].partition(",")[0] or "unknown BLAS"
print(f"{torch.__version__}, {blas}, {torch.backends.cpu.get_cpu_capability()}")
"""


def describe(folder: Path, load: float) -> dict[str, str]:
    """What the numbers depend on; no names of hosts or folders."""
    facts = {
        "processor": f"{processor()}, {cores()} cores",
        "memory": memory(),
        "GPU": ", ".join(f"{gpus().count(name)} × {name}" for name in dict.fromkeys(gpus())) or "none",
        "file system": filesystem(folder),
        "system": f"{platform.system()} {platform.release()}, {first_line(['cp', '--version'])}",
        "Python": platform.python_version(),
        "load before": f"{load:.2f}",
    }
    facts["numpy"] = numpy_with_kernels()
    facts["torch"] = first_line([sys.executable, "-c", TORCH])  # its import would make this process large
    for package in ("peft", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def numpy_with_kernels() -> str:
    """The release of numpy, and the processors that the kernels of its OpenBLAS are made for, here or by the environment."""
    words = [sys.executable, "-c", "import numpy; print(numpy.__version__)"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OPENBLAS_VERBOSE": "2"}
    )
    kernels = [line.partition(":")[2].strip() for line in done.stderr.splitlines() if line.startswith("Core:")]
    return ", ".join([done.stdout.strip() or "unknown", *(f"kernels for {each}" for each in kernels[-1:])])


def processor() -> str:
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> str:
    return f"{memory_line('MemTotal') / 2**30:.1f} GiB"


def memory_line(name: str) -> int:
    """Bytes of one line of /proc/meminfo."""
    for line in read("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def available_memory() -> int:
    return memory_line("MemAvailable")


def gpus() -> list[str]:
    line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return ["GPU of NVIDIA" for _ in Path("/dev").glob("nvidia[0-9]*")]  # without nvidia-smi: as many as there are


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


def commit() -> str:
    """The commit that last changed `loratool/`; with "+" after it where the tree has other changes still."""
    if named := os.environ.get(COMMIT):
        return named
    found = first_line(["git", "-C", str(REPOSITORY), "log", "-1", "--abbrev=10", "--format=%h", "--", "loratool"])
    changes = first_line(["git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "loratool"])
    return found if changes == "unknown" else f"{found}+"


def code() -> str:
    """A digest of the source files of `loratool/`, which a tree without git has too."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "loratool").rglob("*.py")):
        digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
