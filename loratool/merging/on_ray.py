"""A merge by the tasks of a Ray cluster: they make parts wherever Ray has room, and this process deals and publishes.

All that goes through Ray is words, the names of parts and small tables. Bytes go from the base to the output directly,
so every node has to see both under the same names. What a task leaves is what `--part` leaves: after an interruption the
same command continues, and so do `--part` and `--finish`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from loratool.errors import LoratoolError, StorageError, UsageError, printable
from loratool.files.part_records import FilePart, PartRecord
from loratool.files.system import forget_cached
from loratool.merging import parts_in_store
from loratool.merging.dealing import deal
from loratool.merging.in_parts import PartedMerge, make_parts, open_parts, problems, publish
from loratool.merging.in_store import open_store
from loratool.merging.merge import MergeOptions, PathLike, Progress, several
from loratool.merging.options import RAY, ClusterOptions
from loratool.merging.resources import WAITING_WORKERS
from loratool.options.sharing import Share
from loratool.results.merge import MergeReport
from loratool.stores.names import is_in_store

CPUS = 4  # of a task
WAIT = 1.0  # seconds until an interrupt is noticed at the latest
RETRIES = 8  # of a task whose process or node died
SHARES = 4  # for each task that can run at a time, so that little is lost with one that dies
Words = tuple[str, tuple[str, ...], str, MergeOptions]  # base, adapters, OUT and options
Task = Callable[[str, Words, Sequence[str], str], Mapping[str, Any]]
NEEDED = '--workers ray needs Ray: pip install "loratool[ray]"'
OPENED: dict[str, PartedMerge] = {}  # in a process of the cluster: the plan of the merge that it works for


def merge_on_ray(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    cluster: ClusterOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge by tasks of the cluster that `options.workers` names. Raises as `merge` does, and what ended a task."""
    started, alone = time.monotonic(), dataclasses.replace(options, workers=None)
    words = (
        seen_by_all(base),
        tuple(map(seen_by_all, several(adapters))),
        os.fspath(out) if is_in_store(out) else os.path.abspath(out),
        alone,
    )
    if is_in_store(out):
        stored = open_store(base, adapters, out, alone, joining=True)
        refuse_complete(out, stored.committed)
        with Tasks(words, options, cluster, progress, sum(part.size for part in stored.parts)) as tasks:
            tasks.run(make_share_in_store, stored.parts)
            finished = parts_in_store.finish(base, adapters, out, alone)
    else:
        merge = open_parts(base, adapters, out, alone)
        refuse_complete(out, merge.published)
        with Tasks(words, options, cluster, progress, 2 * merge.size) as tasks:
            tasks.run(make_share, merge.parts)
            finished = publish(merge, None, started, tasks.look)
    if finished.merge is None:
        raise UsageError(f"{printable(out)}: another process published this output in the meantime")
    return finished.merge


def refuse_complete(out: PathLike, complete: bool) -> None:
    """Raise `UsageError` where nothing is left to be made."""
    if complete:
        raise UsageError(f"{printable(out)} is complete already; pass another -o, or remove it first")


def seen_by_all(word: PathLike) -> str:
    """An operand as every process understands it, whatever its working folder is."""
    path = os.path.expanduser(word)
    return os.path.abspath(path) if os.path.lexists(path) else os.fspath(word)


def opened(job: str, words: Words) -> PartedMerge:
    """The merge that a job is about, planned once in each process."""
    if job not in OPENED:
        OPENED.clear()
        OPENED[job] = open_parts(*words)
    return OPENED[job]


def make_share(job: str, words: Words, names: Sequence[str], share: str) -> Mapping[str, Any]:
    """The task that makes some parts; a table of what it did."""
    merge, wanted = opened(job, words), {*names}
    return make_parts(merge, [part for part in merge.parts if part.name in wanted], share).to_dict()


def make_share_in_store(job: str, words: Words, names: Sequence[str], share: str) -> Mapping[str, Any]:  # noqa: ARG001
    """The same for an output in a store, where shares are known by their numbers."""
    return parts_in_store.merge_part(*words, Share.of(share)).to_dict()


def check_share(job: str, words: Words, names: Sequence[str], share: str) -> Mapping[str, str]:  # noqa: ARG001
    """The task that reads some parts again; what is wrong with each, by its name."""
    merge, wanted = opened(job, words), {*names}
    parts = [part for part in merge.parts if part.name in wanted]
    for name in {part.file for part in parts}:
        with suppress(FileNotFoundError):  # which is told of every part
            forget_cached(merge.store.folder / name)
    records = merge.store.records()
    there = [part for part in parts if part.name in records]
    return {
        **dict.fromkeys(wanted - {part.name for part in there}, "its record is gone"),
        **problems(merge, there, records),
    }


class Tasks:
    """The tasks of one merge, on a cluster that is connected to for as long as they run."""

    def __init__(
        self, words: Words, options: MergeOptions, cluster: ClusterOptions, progress: Progress | None, total: int
    ) -> None:
        self.ray, self.job = imported(), os.urandom(16).hex()
        self.words, self.options, self.cluster = words, options, cluster
        self.progress, self.done, self.total = progress, 0, total

    def __enter__(self) -> Tasks:
        address = "auto" if self.options.workers == RAY else str(self.options.workers)
        self.joined = not self.ray.is_initialized()
        try:
            if self.joined:
                self.connect(address)
        except (ConnectionError, ValueError) as error:
            lines = str(error).splitlines() or [""]
            told = printable(" ".join(dict.fromkeys((lines[0].strip(), lines[-1].strip()))))
            raise UsageError(
                f"--workers {self.options.workers}: no Ray cluster answers; start one with `ray start --head` ({told})"
            ) from None
        try:
            self.settle([node["Resources"] for node in self.ray.nodes() if node["Alive"]])
        except BaseException:
            self.__exit__()
            raise
        return self

    def connect(self, address: str) -> None:
        """Join the cluster, at the second attempt where a client's own server took longer to start than Ray waits."""
        settings = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            self.ray.init(address, **settings)
        except ConnectionAbortedError:  # a cluster that is not there is another error
            self.ray.init(address, **settings)

    def __exit__(self, *_: object) -> None:
        if self.joined:
            self.ray.shutdown()

    def settle(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Decide what a task gets, and how many can run at a time, by what the nodes have."""
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        cpus = self.cluster.num_cpus or min([CPUS, *(int(node["CPU"]) for node in nodes)])
        gpus = self.cluster.num_gpus
        if gpus is None:
            gpus = int(self.options.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes))
        wanted = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self.room = sum(min(int(node.get(kind, 0) // count) for kind, count in wanted.items()) for node in nodes)
        if not self.room:
            raise UsageError(f"no node of the cluster has the {cpus} CPUs and {gpus} GPUs that a task is to get")
        self.limits = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
        within = dataclasses.replace(self.words[-1], workers=cpus + WAITING_WORKERS, device="cuda" if gpus else "cpu")
        self.shared = self.ray.put((*self.words[:-1], within))

    def run(self, function: Task, parts: Sequence[FilePart]) -> list[Mapping[str, Any]]:
        """What tasks return that have some parts among them. Raises what one of them raised; then none is left."""
        shares = [share for share in deal(parts, min(len(parts), SHARES * self.room)) if share]
        task, found = self.ray.remote(**self.limits)(function), []
        pending = {
            task.remote(self.job, self.shared, [part.name for part in share], f"{number}/{len(shares)}"): share
            for number, share in enumerate(shares, 1)
        }
        try:
            while pending:
                for ready in self.ray.wait([*pending], timeout=WAIT)[0]:
                    found.append(self.ray.get(ready))
                    self.done += sum(part.size for part in pending.pop(ready))
                    if self.progress is not None:
                        self.progress(self.done, self.total)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LoratoolError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise StorageError(f"the cluster lost a task {RETRIES} times: {printable(error)}") from error
        finally:
            for left in pending:
                self.ray.cancel(left, force=True)
        return found

    def look(
        self,
        merge: PartedMerge,  # noqa: ARG002 (each task opens it)
        parts: Sequence[FilePart],
        records: Mapping[str, PartRecord],  # noqa: ARG002 (the same)
        progress: Progress | None,  # noqa: ARG002 (it has that of all tasks)
    ) -> dict[str, str]:
        """What is wrong with some parts, as `problems` tells it."""
        return {name: reason for share in self.run(check_share, parts) for name, reason in share.items()}


def imported() -> Any:
    """Ray. Raises `UsageError` where it is not installed."""
    try:
        import ray
    except ImportError:
        raise UsageError(NEEDED) from None
    return ray
