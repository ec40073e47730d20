"""`--part`: which of several workers this one is, as typed, or as a scheduler tells it in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.errors import UsageError, printable
from loratool.options.described import Kind

MOST = 100_000  # workers
WHOLE = r"(?a)\s*-?\d{1,18}\s*"
WORD = r"(?a)(?P<index>-?\d{1,9}|auto)/(?P<count>-?\d{1,9})|auto"
SLURM, SLURM_OTHERS = "SLURM_ARRAY_TASK_ID", ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
KUBERNETES = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Share:
    """The work of one of several workers: number `index` of `count`, counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 1 <= self.index <= self.count:
            raise UsageError(f"--part must be I/N with I from 1 to N (got {self.index}/{self.count})")
        if self.count > MOST:
            raise UsageError(f"--part: there can be at most {MOST:,} workers (got {self.count:,})")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def of(cls, word: str | Share, environ: Mapping[str, str] = os.environ) -> Share:
        """The share that a word means: `3/8`, or one that is told by variables of `environ`: `auto`, `auto/8`.

        A share means itself. Raises `UsageError`.
        """
        if isinstance(word, Share):
            return word
        match = re.fullmatch(WORD, word.strip())
        if match is None:
            raise UsageError(f"--part must be I/N such as 3/8, auto, or auto/N (got {printable(repr(word))})")
        if match["index"] is None:
            return of_array(environ)
        if match["index"] == "auto":
            return of_kubernetes(environ, int(match["count"]))
        return cls(int(match["index"]), int(match["count"]))


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """The numbers of what each of `count` workers does, so that all of them take about as long.

    What takes longest goes first, to the worker who has the least to do so far.
    """
    from heapq import heappop, heappush

    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, worker) for worker in range(count)]
    for number in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        load, worker = heappop(loads)
        shares[worker].append(number)
        heappush(loads, (load + costs[number], worker))
    return [sorted(share) for share in shares]


def of_array(environ: Mapping[str, str]) -> Share:
    """The share of a task of a Slurm array, or of a process with a rank."""
    slurm, ranked = SLURM in environ, RANK in environ and WORLD_SIZE in environ
    if slurm and ranked and number(environ, WORLD_SIZE) > 1:
        raise UsageError(
            f"--part auto: {SLURM} and {RANK} are both set, so it is unclear which one numbers the workers; pass --part I/N"
        )
    if slurm:
        task, (least, step, count) = number(environ, SLURM), (number(environ, name) for name in SLURM_OTHERS)
        place, rest = divmod(task - least, max(step, 1))
        if rest or not 0 <= place < count:
            raise UsageError(
                f"--part auto: task {task} is not one of {count} evenly spaced ones from {least} on; use an array such as "
                "--array=0-7, or pass --part I/N"
            )
        return Share(place + 1, count)
    if ranked:
        rank, count = number(environ, RANK), number(environ, WORLD_SIZE)
        if not 0 <= rank < count:
            raise UsageError(
                f"--part auto: {RANK} must be from 0 to {WORLD_SIZE} - 1 (got {RANK}={rank}, {WORLD_SIZE}={count})"
            )
        return Share(rank + 1, count)
    if KUBERNETES in environ:
        raise UsageError(f"--part auto: Kubernetes sets {KUBERNETES} but not the number of workers; pass --part auto/N")
    missing = [name for name in (RANK, WORLD_SIZE) if name not in environ]
    unset = f"{missing[0]} is not set" if len(missing) == 1 else "none of them is set"
    raise UsageError(
        f"--part auto needs {SLURM}, or {RANK} and {WORLD_SIZE}, in the environment, and {unset}; pass --part I/N"
    )


def of_kubernetes(environ: Mapping[str, str], count: int) -> Share:
    """The share of a pod of an indexed job of `count` completions."""
    if count < 1:
        raise UsageError(f"--part auto/N: N must be at least 1 (got {count})")
    if KUBERNETES not in environ:
        raise UsageError(
            f"--part auto/{count} needs {KUBERNETES} in the environment, which is not set; pass --part I/N"
        )
    index = number(environ, KUBERNETES)
    if not 0 <= index < count:
        raise UsageError(
            f"--part auto/{count}: {KUBERNETES} is {index}, but {count} workers are numbered from 0 to {count - 1}; N must "
            "be the number of completions of the job"
        )
    return Share(index + 1, count)


def number(environ: Mapping[str, str], name: str) -> int:
    """The whole number that a variable holds."""
    value = environ.get(name)
    if value is None:
        raise UsageError(f"--part auto: {name} is not set")
    if not re.fullmatch(WHOLE, value):
        raise UsageError(f"--part auto: {name} must be a whole number (got {printable(repr(value))})")
    return int(value)


@dataclass(frozen=True)
class ShareKind(Kind):
    """One of several workers."""

    metavar = "I/N"

    def taken(self, value: Any, flag: str) -> Any:
        return value if isinstance(value, Share) else Share.of(super().taken(value, flag))


SHARE = ShareKind()
