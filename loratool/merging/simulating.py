"""How long a merge would take with N workers: a plan's parts, dealt as `--part I/N` deals them, and a model of the cost.

A worker reads, computes and writes at the same time, so a share takes as long as the slowest of these takes for all of
its parts. Nothing is measured here: what a worker and a store can do are numbers that the caller knows.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from loratool.adapters.adapter import stored_tensors
from loratool.merging.tasks import Chunk, chunks_of
from loratool.options.described import FLAG, SIZE, Number, Options, option
from loratool.results.simulation import Limit, Simulation

if TYPE_CHECKING:
    from loratool.merging.plan import MergePlan

PART = 512 << 20  # bytes of a part, at most
GET = 16 << 20  # bytes that one request reads, at most
MOST_COPIED = 5 << 30  # bytes that a store copies at one request: the limit of Amazon S3
UPLOAD = 64 << 20  # bytes of an upload part
# Amazon S3 Standard in us-east-1, for a thousand requests, in dollars (aws.amazon.com/s3/pricing, 2025)
PRICES = {"GET": 0.0004, "LIST": 0.005, "PUT": 0.005, "COPY": 0.005, "POST": 0.005}
LATENCY = 0.1  # seconds until a store begins to answer
COPIED_IN_STORE = 100 << 20  # bytes a second of one copy inside a store
IN_FLIGHT = 16  # requests of one worker


@dataclass(frozen=True, kw_only=True)
class SimulationOptions(Options):
    """Of a plan: with how many workers of what kind the merge is simulated."""

    simulate: tuple[int, ...] = option(
        help="Also print how long the merge takes with this many workers, what limits it and what it moves; may be "
        "repeated, or a comma-separated list. Only headers are read.",
        default=(),
        kind=Number(whole=True, low=1, high=100_000),
        many=True,
        commas=True,
    )
    bandwidth: int | None = option(
        help="With --simulate: bytes a second that a worker reads, and that it writes at the same time [default: 1GB].",
        kind=SIZE,
    )
    store_bandwidth: int | None = option(
        help="With --simulate: bytes a second that the file system or store can read, and can write, for all workers "
        "together [default: no limit].",
        kind=SIZE,
    )
    compute_rate: int | None = option(
        help="With --simulate: bytes a second of edited weights that a worker computes [default: 500MB].", kind=SIZE
    )
    copy_rate: int | None = option(
        help="With --simulate: bytes a second that a worker copies and makes digests of [default: 2GB].", kind=SIZE
    )
    startup: float = option(
        help="With --simulate: seconds until a worker has started and read the headers.",
        default=10.0,
        kind=Number(low=0),
    )
    object_store: bool = option(
        help="With --simulate: the merge is from one object store into another, which copies untouched ranges itself; "
        "requests are counted, and priced as those of Amazon S3.",
        default=False,
        kind=FLAG,
    )


@dataclass(frozen=True)
class Rates:
    """What a worker and a store can do, in bytes a second."""

    bandwidth: float = 1e9
    store: float = float("inf")
    compute: float = 5e8
    copy: float = 2e9
    startup: float = 10.0  # seconds
    objects: bool = False  # whether the base and the output are in an object store

    @classmethod
    def of(cls, options: SimulationOptions) -> Rates:
        return cls(
            options.bandwidth or cls.bandwidth,
            options.store_bandwidth or cls.store,
            options.compute_rate or cls.compute,
            options.copy_rate or cls.copy,
            options.startup,
            options.object_store,
        )


@dataclass
class Load:
    """What a worker has to do, or what all of them have to do together. Sizes are bytes."""

    read: int = 0
    computed: int = 0
    copied: int = 0
    copied_in_store: int = 0
    written: int = 0
    requests: Counter[str] = field(default_factory=Counter)

    def add(self, other: Load) -> None:
        """Take on what another one has to do."""
        self.read += other.read
        self.computed += other.computed
        self.copied += other.copied
        self.copied_in_store += other.copied_in_store
        self.written += other.written
        self.requests += other.requests

    def seconds(self, rates: Rates, workers: int = 1) -> dict[Limit, float]:
        """What each of the things takes that are done at the same time, spread over some workers."""
        waiting = self.requests.total() * LATENCY + self.copied_in_store / COPIED_IN_STORE
        band = min(rates.bandwidth * workers, rates.store)
        return {
            "reading": self.read / band,
            "writing": self.written / band,
            "computing": (self.computed / rates.compute + self.copied / rates.copy) / workers,
            "requests": waiting / IN_FLIGHT / workers if rates.objects else 0.0,
        }


def simulate(plan: MergePlan, workers: Sequence[int], rates: Rates) -> tuple[Simulation, ...]:
    """The merge with each of some numbers of workers."""
    parts = [load_of(part, rates.objects) for part in parts_of(plan)]
    return tuple(simulation(plan, parts, count, rates) for count in workers)


def simulation(plan: MergePlan, parts: Sequence[Load], workers: int, rates: Rates) -> Simulation:
    shares = deal(parts, workers, rates)
    total = summed(parts)
    headers = len(plan.base.shards) + len(plan.adapters)
    if rates.objects:  # every worker plans, and who finishes does too
        total.requests["GET"] += 2 * headers * (workers + 1)
        total.requests += Counter(POST=2 * len(plan.shards), LIST=len(plan.shards), PUT=len(plan.side_files) + 2)
    longest = max(max(share.seconds(rates).values()) for share in shares)
    limit, even = max(total.seconds(rates, workers).items(), key=lambda item: item[1])
    work = max(longest, even)
    finish = finishing(plan, rates)
    due: dict[Limit, float] = {
        "start-up": rates.startup,
        limit: even,
        "largest part": work - even,
        "finishing": finish,
    }
    return Simulation(
        workers=workers,
        seconds=rates.startup + work + finish,
        limit=max(due, key=lambda name: due[name]),
        startup_seconds=rates.startup,
        work_seconds=work,
        even_seconds=even,
        finish_seconds=finish,
        parts=len(parts),
        busy=len(shares),
        largest_part=max((max(part.seconds(rates).values()) for part in parts), default=0.0),
        bytes_read=total.read,
        bytes_computed=total.computed,
        bytes_copied=total.copied,
        bytes_copied_in_store=total.copied_in_store,
        bytes_written=total.written,
        requests=dict(sorted(total.requests.items())) if rates.objects else {},
        dollars=sum(PRICES[kind] * count / 1000 for kind, count in total.requests.items()) if rates.objects else 0.0,
    )


def finishing(plan: MergePlan, rates: Rates) -> float:
    """Seconds that publishing takes when all parts are there."""
    requests = 2 * len(plan.shards) + len(plan.side_files) + 2
    return rates.startup + (requests * LATENCY / IN_FLIGHT if rates.objects else 0.0)


def summed(loads: Iterable[Load]) -> Load:
    total = Load()
    for load in loads:
        total.add(load)
    return total


def deal(parts: Sequence[Load], workers: int, rates: Rates) -> list[Load]:
    """Shares of workers, as equal in time as can be: the largest part first, always to who has least."""
    times = [(max(part.seconds(rates).values()), number) for number, part in enumerate(parts)]
    shares = [(0.0, number, Load()) for number in range(min(workers, len(parts)))]
    for seconds, number in sorted(times, reverse=True):
        busy, own, share = shares[0]
        share.add(parts[number])
        heapq.heapreplace(shares, (busy + seconds, own, share))
    return [share for _, _, share in shares]


Part = list[Chunk]


def parts_of(plan: MergePlan) -> Iterator[Part]:
    """Chunks that follow each other in one file, all of them copied or all computed."""
    for shard in plan.shards:
        part: Part = []
        for chunk in (chunk for span in shard.spans for chunk in chunks_of(span) if chunk.size):
            turns = part and is_copy(chunk) != is_copy(part[-1])
            if turns or sum(each.size for each in part) + chunk.size > PART:
                yield part
                part = []
            part.append(chunk)
        if part:
            yield part


def is_copy(chunk: Chunk) -> bool:
    return chunk.span.carried is not None


def load_of(part: Part, objects: bool) -> Load:
    """What a part takes."""
    load = Load()
    for copied, chunks in groupby(part, is_copy):
        run = list(chunks)
        size = sum(chunk.size for chunk in run)
        if copied and objects:
            load.add(Load(copied_in_store=size, requests=Counter(COPY=-(-size // MOST_COPIED))))
        elif copied:
            load.add(Load(read=size, copied=size, written=size))
        else:
            read = sum(read_for(chunk) for chunk in run)
            requests = Counter(GET=-(-read // GET), PUT=-(-size // UPLOAD)) if objects else Counter[str]()
            load.add(Load(read + factors_of(run), size, written=size, requests=requests))
    return load


def read_for(chunk: Chunk) -> int:
    """Bytes of the base that a chunk is computed from."""
    span = chunk.span
    stored = sum(tensor.info.nbytes for tensor in span.weight.tensors)
    return stored * chunk.size // span.placed.nbytes


def factors_of(part: Part) -> int:
    """Bytes of the adapters that a part is computed with."""
    updates = {id(edit.update): edit.update for chunk in part for edit in chunk.span.edits}
    return sum(tensor.info.nbytes for update in updates.values() for tensor in stored_tensors(update))
