"""A merge by the tasks of a Ray cluster: they make parts wherever Ray has room, and this process deals and publishes.

All that Ray carries is words, the names of parts and small tables. Bytes go from the base to the output directly, so every
process has to see both under the same names. What a task leaves is what `--part` leaves: after an interruption the same
command continues, and so do `--part` and `--finish`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loratool.arguments import PathLike, Progress, several
from loratool.errors import LoratoolError, StorageError, UsageError, printable
from loratool.files.part_records import FilePart, PartRecord
from loratool.merging.dealing import deal
from loratool.merging.in_parts import make_parts, publish
from loratool.merging.merge_options import ClusterOptions, MergeOptions
from loratool.merging.options import RAY
from loratool.merging.parted_merge import PartedMerge, open_parts
from loratool.merging.resources import GPU_WORKERS, WAITING_WORKERS
from loratool.results.merge import MergeReport
from loratool.stores.names import is_in_store

CPUS = 4  # of a task without a GPU
WAIT = 1.0  # seconds until an interrupt is noticed at the latest
RETRIES = 8  # of a task whose process or node died
SHARES = 4  # for each task that can run at a time, so that little is lost with one that dies
INSTALL = 'pip install "loratool[ray]"'
Words = tuple[str, tuple[str, ...], str, MergeOptions]  # base, adapters, OUT and options
Task = Callable[[str, Words, Sequence[str], str], Mapping[str, Any]]  # of a job, its words, names of parts, and a share
OPENED: dict[str, PartedMerge] = {}  # in a process of the cluster: the plan of the merge that it works for


def merge_on_ray(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    cluster: ClusterOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge by tasks of the cluster that `options.workers` names. Raises as `merge` does, and what ended a task.

    What several nodes wrote to a file system is read once more: their page caches need not know of each other.
    """
    words = words_of(base, adapters, out, options)
    merge = open_parts(*words)
    shown, shared = printable(words[2]), merge.output.read_to_check
    if merge.published:
        raise UsageError(f"{shown} is complete already; pass another -o, or remove it first")
    with Tasks(words, options, cluster, progress).connected() as tasks:

        def check(parts: Sequence[FilePart], *_: object) -> Mapping[str, str]:
            if not tasks.several:
                return {}
            tasks.total = 2 * merge.size  # a node may have joined
            return {name: reason for found in tasks.run(check_share, parts) for name, reason in found.items()}

        tasks.total = merge.size * (2 if shared and tasks.several else 1)
        tasks.run(make_share, merge.parts)
        finished = publish(merge, None, check if shared else None)
    if finished.merge is None:
        raise UsageError(f"{shown}: another process published this output in the meantime")
    return finished.merge


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


class Tasks:
    """The tasks of one merge, on a cluster."""

    def __init__(self, words: Words, options: MergeOptions, cluster: ClusterOptions, progress: Progress | None) -> None:
        self.ray, self.job = imported(), os.urandom(16).hex()
        self.words, self.options, self.cluster = words, options, cluster
        self.progress, self.done = progress, 0
        self.total = 0  # bytes that all of them have, to make and to read, for progress

    @contextmanager
    def connected(self) -> Iterator[Tasks]:
        """The same, connected to the cluster, which stays so afterwards if it was before."""
        address = "auto" if self.options.workers == RAY else str(self.options.workers)
        self.joined = not self.ray.is_initialized()
        try:
            if self.joined:
                self.connect(address)
        except (ConnectionError, ValueError) as error:
            lines = str(error).splitlines() or [""]
            told = printable(" ".join(dict.fromkeys((lines[0].strip(), lines[-1].strip()))))
            raise UsageError(
                f"--workers {self.options.workers}: no Ray cluster answers; start one with `ray start --head`, or set "
                f"RAY_AUTH_MODE=token if it asks for a token ({told})"
            ) from None
        try:
            self.settle([node["Resources"] for node in self.ray.nodes() if node["Alive"]])
            yield self
        finally:
            if self.joined:
                self.ray.shutdown()

    def connect(self, address: str) -> None:
        """Join the cluster, at the second attempt where a client's own server took longer to start than Ray waits."""
        settings = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            self.ray.init(address, **settings)
        except ConnectionAbortedError:  # a cluster that is not there is another error
            self.ray.init(address, **settings)

    def settle(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Decide what a task gets, and how many can run at a time, by what the nodes have."""
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        gpus = self.cluster.num_gpus
        if gpus is None:
            gpus = int(self.options.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes))
        without = min([CPUS, *(int(node["CPU"]) for node in nodes)])  # numpy has little use for more
        cpus = self.cluster.num_cpus or (cpus_beside(gpus, nodes) if gpus else without)
        self.wanted = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self.room = sum(map(self.room_on, nodes))
        if not self.room:
            raise UsageError(f"no node of the cluster has the {cpus} CPUs and {gpus} GPUs that a task needs")
        # a process that has prepared its GPU is there for the next task, too: Ray would start another one for each
        self.limits = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES, "max_calls": 0}
        workers, device = (cpus, "cuda") if gpus else (cpus + WAITING_WORKERS, "cpu")
        within = dataclasses.replace(self.words[-1], workers=workers, device=device)
        self.shared = self.ray.put((*self.words[:-1], within))

    def room_on(self, node: Mapping[str, float]) -> int:
        """How many tasks fit on a node."""
        return min(int(node.get(kind, 0) // count) for kind, count in self.wanted.items())

    @property
    def several(self) -> bool:
        """Whether more than one node has room, or may have had it before it was gone."""
        return sum(not node["Alive"] or bool(self.room_on(node["Resources"])) for node in self.ray.nodes()) > 1

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
            # a cluster ends the tasks of a driver that leaves; to cancel one that is done at that moment ends this process
            for left in () if self.joined else pending:
                self.ray.cancel(left, force=True)
        return found


def cpus_beside(gpus: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """CPUs of a task with some GPUs, which divide those of a node: a GPU waits for the cores that read, hash and write."""
    shares = [int(node["CPU"] // (node["GPU"] // gpus)) for node in nodes if node.get("GPU", 0) >= gpus]
    return max(1, min([GPU_WORKERS * gpus, *shares]))


def imported() -> Any:
    """Ray. Raises `UsageError` where it is not installed."""
    try:
        import ray
    except ImportError:
        raise UsageError("--workers ray needs Ray, which is not installed", hint=INSTALL) from None
    return ray


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
