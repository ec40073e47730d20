"""A merge that many processes make together: each does its share of the parts, and one puts the whole together.

    open_parts   plan, cut the weight files into parts, look at what is at the output      nothing is written
    make_parts   those of some parts that are not there
    publish      compare every part with its record, write the small files, give the output its name

Any process may make any part, at any time, twice too. Where the bytes go, a `SharedOutput` knows: a folder that all see,
or a store. After an interruption the same calls go on with what is there.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.errors import UsageError, VerificationError, printable
from loratool.files import stopwatch
from loratool.files.digests import sha256_of
from loratool.files.folders import CARD, PROVENANCE
from loratool.files.known_digests import KnownDigests
from loratool.files.part_records import FilePart, PartRecord, PublishedError, SharedOutput
from loratool.files.sink import Destination, Sink
from loratool.files.staging import Stage
from loratool.merging.dealing import across_files, plan_of, share_of
from loratool.merging.merge import (
    NOTHING,
    Making,
    Report,
    check_values,
    make_one,
    repeated,
)
from loratool.merging.merge_options import MergeOptions
from loratool.merging.parted_merge import PartedMerge, open_parts, unfinished
from loratool.merging.reporting import Merged, cost, describe, make_report
from loratool.merging.resources import check_limit, runtime_for
from loratool.merging.small_files import read_again, write_record, write_small_files
from loratool.merging.tasks import Job
from loratool.merging.whole_files import whole_file
from loratool.notes import Note
from loratool.options.sharing import Share
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.abort import AbortReport
from loratool.results.base import Cost
from loratool.results.parts import FinishReport, PartReport, PartsStatus, Running
from loratool.results.profile import Profile
from loratool.stores.upload_part import UploadPart

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.devices import Runtime
    from loratool.files.safefile import Layout

# tells what is wrong with some parts that have records, as `SharedOutput.problems` does
Check = Callable[[Sequence[FilePart], Mapping[str, PartRecord], Progress | None], Mapping[str, str]]


# they say how parts are made, or what becomes of a whole output
IDLE_IN_STATUS = ("--device", "--workers", "--max-memory", "--sha256", "--digests", "--verify", "--accept-loss")


class IncompleteError(VerificationError):
    """Parts are missing or damaged; those that have no record any more can be made again."""


@dataclass(frozen=True)
class PartDestination(Destination):
    """Where the engine sends parts: each is a file of its plan."""

    output: SharedOutput
    parts: Mapping[str, FilePart]

    def open(self, name: str, layout: Layout, stop: threading.Event) -> Sink:  # noqa: ARG002 (that of the whole file)
        return self.output.open(self.parts[name], stop)


def merge_part(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    share: Share,
    progress: Progress | None = None,
) -> PartReport:
    """Do one worker's share of a merge; `loratool.merge_part` says all of it."""
    merge = open_parts(base, adapters, out, options)
    return make_parts(merge, share_of(merge.parts, share), str(share), progress)


def make_parts(
    merge: PartedMerge, parts: Sequence[FilePart], share: str, progress: Progress | None = None
) -> PartReport:
    """Make some parts of a merge, each at most once; those that are there, with the right bytes, are kept.

    Args:
        merge: from `open_parts`.
        parts: some of its parts.
        share: what they are called together, for people.
        progress: called with (bytes done, total bytes).
    """
    try:
        return make(merge, parts, share, progress)
    except PublishedError:
        took = Cost.since(merge.started)
        return PartReport(merge.output.out, share, merge.output.plan, (), (), {}, 0, True, (), cost=took)


def make(merge: PartedMerge, parts: Sequence[FilePart], share: str, progress: Progress | None = None) -> PartReport:
    """Make those of some parts that are not there; raises `PublishedError` where the output is complete."""
    runtime = runtime_for(plan_of(merge.plan, parts).spans, merge.options)
    return result_of(making(merge, parts, share, runtime), merge, runtime, progress)


def result_of(
    making: Making[Report], merge: PartedMerge, runtime: Future[Runtime], progress: Progress | None
) -> Report:
    """What comes of the making of one merge, or of parts of it."""
    with stopwatch.timed("main"):
        return make_one(making, merge.options, runtime, progress, merge.output.held(merge.parts))


def making(merge: PartedMerge, parts: Sequence[FilePart], share: str, runtime: Future[Runtime]) -> Making[PartReport]:
    """Make some parts, as a generator: it gives its job, and is to be sent the engine that has run it."""
    if merge.published:
        raise PublishedError
    output = merge.output
    check_values(merge.plan)
    if merge.options.max_memory is not None:  # refused before anything is written
        check_limit(plan_of(merge.plan, parts).spans, runtime.result(), merge.options, output.held(merge.parts))
    with output.at_work(share, parts):
        records = output.records()
        there = [part for part in parts if part.name in records]
        redone = output.problems(there, records)
        for name in redone:
            output.forget(name)
        todo = [part for part in parts if part.name not in records or part.name in redone]
        plan = plan_of(merge.plan, todo)
        notes = tuple(plan.check_packed(plan.spans))
        computed = output.make_alone(todo)
        destination = PartDestination(output, {part.name: part for part in computed})
        job = Job(plan_of(merge.plan, across_files(computed)), destination, apart=True)
        engine = yield job
        if job.failure is not None:
            raise job.failure
    return PartReport(
        out=output.out,
        share=share,
        plan=output.plan,
        made=tuple(part.name for part in todo),
        kept=tuple(part.name for part in there if part.name not in redone),
        redone=redone,
        bytes_written=sum(part.size for part in todo),
        published=False,
        notes=notes,
        workers=engine.resources().workers,
        profile=Profile(stopwatch.together(engine.watches)),
        cost=cost(runtime, merge.started),
    )


def merge_status(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> PartsStatus:
    """How far a merge in parts is; nothing is written and no weights are read."""
    merge = open_parts(base, adapters, out, options)
    output, published = merge.output, merge.published
    records = {} if published else output.records()
    running = () if published else output.workers()
    return PartsStatus(
        out=output.out,
        plan=output.plan,
        published=published,
        parts=len(merge.parts),
        done={name: record.worker for name, record in records.items()},
        missing=() if published else tuple(part.name for part in merge.parts if part.name not in records),
        running=tuple(Running(str(each), each.share, each.doing, each.seconds, each.alive) for each in running),
        bytes_done=merge.size if published else sum(p.size for p in merge.parts if p.name in records),
        bytes_all=merge.size,
        notes=idle_notes("--status", [flag for flag in options.given() if flag in IDLE_IN_STATUS]),
        cost=Cost.since(merge.started),
    )


def idle_notes(way: str, flags: Sequence[str]) -> tuple[Note, ...]:
    """That some options have no effect on a way to call `merge`."""
    return (Note("options-not-used", f"{way} does not use {', '.join(flags)}"),) if flags else ()


def finish(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> FinishReport:
    """Put the parts of a merge together and publish the output; `loratool.finish_merge` says all of it."""
    return publish(open_parts(base, adapters, out, options), progress)


def publish(merge: PartedMerge, progress: Progress | None = None, check: Check | None = None) -> FinishReport:
    """Publish a merge from `open_parts`; `check` tells what is wrong with its parts, in the place of the output."""
    output = merge.output
    complete_already = FinishReport(output.out, output.plan, len(merge.parts), (), False, None)
    if merge.published or output.is_published():  # perhaps since the merge was opened
        output.clear()  # of a run that was killed after it had published
        return complete_already
    try:
        with output.finishing() as stage:
            records = complete(merge, check or output.problems, progress)
            merged = put_together(merge, stage, records)
            output.publish(stage)
            output.clear()
            workers = tuple(sorted({record.worker for record in records.values()}))
            report = make_report(merged, stage, Cost.since(merge.started, merged.device))
    except PublishedError:  # by another one, at the same time
        return complete_already
    verified = len(stage.files) if merge.options.verify and not output.read_to_check else 0
    report = dataclasses.replace(
        report,
        out=output.out,
        workers=len(workers),
        verified=verified,
        notes=(*report.notes, *copied_notes(merge.parts)),
    )
    return dataclasses.replace(complete_already, workers=workers, published=True, merge=report, cost=report.cost)


def copied_notes(parts: Sequence[FilePart]) -> Iterator[Note]:
    """That bytes of the output were never read here."""
    if size := sum(part.size for part in parts if isinstance(part, UploadPart) and part.source is not None):
        text = f"{size} bytes were copied inside the store and not read here; `loratool verify` reads them"
        yield Note("copied-in-store", text)


def complete(merge: PartedMerge, check: Check, progress: Progress | None) -> Mapping[str, PartRecord]:
    """The records of all parts, once each part was found to be what its record says.

    Raises `IncompleteError` naming the parts that are missing, and those that are damaged, whose records go.
    """
    output, parts = merge.output, merge.parts
    records = output.records()
    if missing := [part.name for part in parts if part.name not in records]:
        raise IncompleteError(
            f"{printable(output.out)}: not published: {len(missing)} of {len(parts)} parts are missing; run the "
            "missing workers, or --part 1/1 for all that is left; see --status:",
            missing,
        )
    refuse_strays(merge)
    output.assemble(parts, records)
    damaged = check(parts, records, progress)
    for name in damaged:
        output.forget(name)
    if damaged:
        raise IncompleteError(
            f"{printable(output.out)}: not published: {len(damaged)} of {len(parts)} parts are damaged; their records "
            "were removed, and --part 1/1 makes them again:",
            [f"{name}: {why}" for name, why in damaged.items()],
        )
    return records


def refuse_strays(merge: PartedMerge) -> None:
    """Raise `UsageError` where a worker is still making a part whose bytes may come out differently."""
    inexact = {part.name for part in merge.parts if part.work.keys() & {"formula", "compensated", "repack"}}
    for worker in merge.output.workers():
        if worker.alive and (again := inexact & {*worker.doing}):
            raise UsageError(
                f"{printable(merge.output.out)}: {printable(str(worker))} is still making {', '.join(sorted(again))}; "
                "wait for it to end, or stop it"
            )


def put_together(merge: PartedMerge, stage: Stage, records: Mapping[str, PartRecord]) -> Merged:
    """Give the weights their names, and write everything else into the stage; what is to be said of the merge."""
    output, options = merge.output, merge.options
    plan = dataclasses.replace(merge.plan, notes=(*merge.plan.notes, *merge.plan.check_packed(merge.plan.spans)))
    full = options.digests == "full"
    known = None if full else KnownDigests(plan.base.root)
    for shard in plan.shards:
        own = [(part, records[part.name]) for part in merge.parts if part.file == shard.name]
        stage.keep(whole_file(plan, shard, own, known))
    unchanged = f"{printable(output.out)}: not written, {NOTHING}"
    merged = describe(plan, stage.finished, merge.digests, repeated(plan, merge.paths, options), unchanged)
    merged.table["base"] |= told_model(plan.base, ModelDigests.of(plan.base, compute=full))
    merged.table["plan"] = output.plan
    for name in (PROVENANCE, CARD, *(file.name for file in plan.side_files)):  # of a run that was killed here
        (stage.folder / name).unlink(missing_ok=True)
    write_small_files(stage, plan, () if merge.single else plan.side_files, merged.table, card=not merge.single)
    output.name_weights(stage, records, options.sha256 or options.verify)
    if options.sha256:
        for shard in plan.shards:
            finished = stage.finished[shard.name]
            digest = dataclasses.replace(finished.digest, sha256=sha256_of(stage.folder / shard.name))
            stage.keep(dataclasses.replace(finished, digest=digest))
        write_record(stage, merged.table)
    if options.verify and not output.read_to_check:
        try:
            read_again(stage)
        except VerificationError:
            output.abort()
            raise
    return merged


def abort(out: PathLike) -> AbortReport:
    """Remove what an unfinished output left; `loratool.abort_merge` says all of it."""
    started = time.monotonic()
    output = unfinished(out)
    if alive := [worker for worker in output.workers() if worker.alive]:
        raise UsageError(
            f"{printable(out)}: not aborted, because workers are running; stop them first: "
            f"{', '.join(printable(str(worker)) for worker in alive)}"
        )
    published = output.is_published()
    uploads, removed = output.abort()
    cost = Cost.since(started)
    return AbortReport(output.out, output.command, output.plan, published, tuple(uploads), tuple(removed), cost=cost)
