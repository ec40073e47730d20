"""A merge by the tasks of any scheduler: what a task does, and the whole of which its tasks are a part.

All that a scheduler carries is words, the names of parts and small tables. Bytes go from the base to the output directly,
so every process has to see both under the same names. What a task leaves is what `--part` leaves: after an interruption
the same command continues, and so do `--part` and `--finish`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from loratool.arguments import PathLike, several
from loratool.errors import UsageError, printable
from loratool.files.part_records import FilePart, PartRecord
from loratool.merging.in_parts import make_parts, publish
from loratool.merging.merge_options import MergeOptions
from loratool.merging.parted_merge import PartedMerge, open_parts
from loratool.results.merge import MergeReport
from loratool.stores.names import is_in_store

Words = tuple[str, tuple[str, ...], str, MergeOptions]  # base, adapters, OUT and options
Task = Callable[[str, Words, Sequence[str], str], Mapping[str, Any]]  # of a job, its words, names of parts, and a share
OPENED: dict[str, PartedMerge] = {}  # in a process of the scheduler: the plan of the merge that it works for


class Scheduler(Protocol):
    """What runs tasks."""

    total: int  # bytes that all of them have, to make and to read, for progress

    @property
    def several(self) -> bool:
        """Whether more than one machine may have run some of them."""
        ...

    def run(self, task: Task, parts: Sequence[FilePart]) -> list[Mapping[str, Any]]:
        """What tasks return that have some parts among them; raises what one of them raised."""
        ...


def words_of(base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions) -> Words:
    """The operands of a merge as every process understands them, and the options of one that uses threads."""
    return (
        seen_by_all(base),
        tuple(map(seen_by_all, several(adapters))),
        os.fspath(out) if is_in_store(out) else os.path.abspath(out),
        dataclasses.replace(options, workers=None),
    )


def seen_by_all(word: PathLike) -> str:
    """An operand as every process understands it, whatever its working folder is."""
    path = os.path.expanduser(word)
    return os.path.abspath(path) if os.path.lexists(path) else os.fspath(word)


def merge_by_tasks(words: Words, scheduler: Callable[[], AbstractContextManager[Scheduler]]) -> MergeReport:
    """Merge by the tasks of a scheduler; raises as `merge` does, and what ended a task.

    What several machines wrote to a file system is read once more: their page caches need not know of each other.
    """
    merge = open_parts(*words)
    shown, shared = printable(words[2]), merge.output.read_to_check
    if merge.published:
        raise UsageError(f"{shown} is complete already; pass another -o, or remove it first")
    with scheduler() as tasks:

        def check(parts: Sequence[FilePart], *_: object) -> Mapping[str, str]:
            if not tasks.several:
                return {}
            tasks.total = 2 * merge.size  # a machine may have joined
            return {name: reason for found in tasks.run(check_share, parts) for name, reason in found.items()}

        tasks.total = merge.size * (2 if shared and tasks.several else 1)
        tasks.run(make_share, merge.parts)
        finished = publish(merge, None, check if shared else None)
    if finished.merge is None:
        raise UsageError(f"{shown}: another process published this output in the meantime")
    return finished.merge


def opened(job: str, words: Words) -> PartedMerge:
    """The merge that a job is about, planned once in each process; the time of each task counts from now on."""
    if job not in OPENED:
        OPENED.clear()
        OPENED[job] = open_parts(*words)
    return dataclasses.replace(OPENED[job], started=time.monotonic())


def make_share(job: str, words: Words, names: Sequence[str], share: str) -> Mapping[str, Any]:
    """The task that makes some parts; a table of what it did."""
    merge, wanted = opened(job, words), {*names}
    return make_parts(merge, [part for part in merge.parts if part.name in wanted], share).to_dict()


def check_share(job: str, words: Words, names: Sequence[str], share: str) -> Mapping[str, str]:  # noqa: ARG001
    """The task that reads some parts again; what is wrong with each, by its name."""
    merge, wanted = opened(job, words), {*names}
    records: Mapping[str, PartRecord] = merge.output.records()
    there = [part for part in merge.parts if part.name in wanted & records.keys()]
    gone = wanted - {part.name for part in there}
    return {**dict.fromkeys(gone, "its record is gone"), **merge.output.problems(there, records)}
