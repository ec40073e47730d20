"""How long a merge would take with N workers: a plan's parts, dealt as `--part I/N` deals them, and a model of the cost.

A worker reads, computes and writes at the same time, so a share takes as long as the slowest of these takes for all of
its parts. Nothing is measured here: what a worker and a store can do are numbers that the caller knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from loratool.files.part_records import FilePart
from loratool.merging.dealing import deal, parts_of
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan
from loratool.merging.upload_parts import upload_parts
from loratool.options.described import FLAG, SIZE, Number, Options, option
from loratool.results.simulation import Limit, Simulation
from loratool.stores.limits import Limits
from loratool.stores.names import StorePath
from loratool.stores.objects import PIECE, StoredObject
from loratool.stores.upload_part import UploadPart

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
        help="With --simulate: bytes a second that a worker copies and hashes [default: 2GB].", kind=SIZE
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

    def __add__(self, other: Load) -> Load:
        return Load(
            self.read + other.read,
            self.computed + other.computed,
            self.copied + other.copied,
            self.copied_in_store + other.copied_in_store,
            self.written + other.written,
            self.requests + other.requests,
        )

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


def simulate(plan: Plan, workers: Sequence[int], rates: Rates) -> tuple[Simulation, ...]:
    """The merge with each of some numbers of workers."""
    parts: Sequence[FilePart] = upload_parts(plan, Limits(), in_a_bucket) if rates.objects else parts_of(plan)
    spans = {shard.name: {shard.own_name(span): span for span in shard.spans} for shard in plan.shards}
    loads = {part.name: load_of(part, spans[part.file]) for part in parts}
    return tuple(simulation(plan, parts, loads, count, rates) for count in workers)


def simulation(
    plan: Plan, parts: Sequence[FilePart], loads: Mapping[str, Load], workers: int, rates: Rates
) -> Simulation:
    shares = [sum((loads[part.name] for part in share), Load()) for share in deal(parts, workers) if share]
    for share in shares:  # each reads the adapters
        share.read += sum(adapter.file.layout.size for adapter in plan.adapters)
        share.requests += Counter(GET=2 * (len(plan.base.shards) + len(plan.adapters)) if rates.objects else 0)
    total = sum(shares, Load())
    longest = max(max(share.seconds(rates).values()) for share in shares)
    limit, even = max(total.seconds(rates, workers).items(), key=lambda item: item[1])
    work, finish = max(longest, even), finishing(plan, len(parts), rates)
    if rates.objects:
        total.requests += requests_to_finish(plan, len(parts))
    due: dict[Limit, float] = {
        "start-up": 2 * rates.startup,
        limit: even,
        "largest part": work - even,
        "finishing": finish - rates.startup,
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
        largest_part=max(max(load.seconds(rates).values()) for load in loads.values()),
        bytes_read=total.read,
        bytes_computed=total.computed,
        bytes_copied=total.copied,
        bytes_copied_in_store=total.copied_in_store,
        bytes_written=total.written,
        requests=dict(sorted(total.requests.items())),
        dollars=sum(PRICES[kind] * count / 1000 for kind, count in total.requests.items()),
    )


def finishing(plan: Plan, parts: int, rates: Rates) -> float:
    """Seconds until the output is published when all parts are there.

    One process reads every byte again; those in an object store have checksums of the store.
    """
    if rates.objects:
        return rates.startup + requests_to_finish(plan, parts).total() * LATENCY / IN_FLIGHT
    return rates.startup + plan.bytes_written / min(rates.bandwidth, rates.store)


def requests_to_finish(plan: Plan, parts: int) -> Counter[str]:
    """Those of who publishes: headers, records of parts, an upload to begin, list and complete for each file, small files."""
    files, gets = len(plan.shards), 2 * (len(plan.base.shards) + len(plan.adapters)) + parts
    small = len(plan.side_files) + 4  # a card, the record, and what says that a merge is at work
    return Counter(GET=gets, POST=2 * files, LIST=files + 1, PUT=small)


@cache
def in_a_bucket(path: Path) -> StoredObject:
    """What a file of the base would be in an object store."""
    return StoredObject(StorePath("bucket", path.as_posix()), 0, "", 0)


def load_of(part: FilePart, spans: Mapping[str, Span]) -> Load:
    """What a part takes of an output file that has these spans; of an upload its record is included."""
    if isinstance(part, UploadPart) and part.source is not None:
        return Load(copied_in_store=part.size, requests=Counter(COPY=len(part.pieces), PUT=1))
    load = Load(written=part.payload)
    for tensor, _, size in part.chunks:
        span = spans[tensor]
        load.read += sum(each.info.nbytes for each in span.weight.tensors) * size // span.placed.nbytes
        load.copied += size if span.carried is not None else 0
    load.computed = part.payload - load.copied
    if isinstance(part, UploadPart):
        edges = sum(fringe.size for fringe in part.fringes)
        load += Load(edges, copied=edges, written=edges)
        load.requests.update(GET=-(-load.read // PIECE), PUT=len(part.pieces) + 1)
    return load
