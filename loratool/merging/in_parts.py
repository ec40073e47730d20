"""A merge that many machines make together: each does its share of the parts, and one puts the whole together.

`open_parts` plans, `make_parts` makes some parts, `finish` publishes. Where the bytes go is a `PartStore`'s business.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.formats import replaceable
from loratool.errors import LoratoolError, UsageError, VerificationError, printable
from loratool.files.checkpoint import PROVENANCE, sidecar_of
from loratool.files.digests import Digest, Listed, Reference, Tree, digest_of_part, sha256_of
from loratool.files.inputs import LARGEST_RECORD, read_json
from loratool.files.journal import MODEL, PARTS, FinishedShard, Journal, Seen
from loratool.files.known_digests import KnownDigests
from loratool.files.outputs import check_stage, stage_of
from loratool.files.part_records import FilePart, PartRecord, PartStore
from loratool.files.presence import Presence, alone, workers_in
from loratool.files.process import cores, peak_memory
from loratool.files.shared_folder import SharedFolder, remove_stage
from loratool.files.sink import PAGE
from loratool.files.staging import Stage, check_space, storage_error
from loratool.files.system import forget_cached
from loratool.merging.dealing import parts_of, plan_of, share_of
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint
from loratool.merging.merge import (
    NOTHING,
    Merged,
    MergeOptions,
    PathLike,
    Progress,
    check_values,
    cost,
    describe,
    make_report,
    output_names,
    prepare,
    repeated,
    write_small_files,
)
from loratool.merging.one_file import is_file
from loratool.merging.resources import Resources, runtime_for
from loratool.merging.tasks import Job, known_of
from loratool.merging.totals import summed
from loratool.options.sharing import Share
from loratool.provenance.cards import CARD
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.abort import AbortReport
from loratool.results.base import Cost
from loratool.results.parts import FinishReport, PartReport, PartsStatus, Running
from loratool.results.profile import Profile

if TYPE_CHECKING:
    from loratool.files.safefile import Layout
    from loratool.files.sink import Sink
    from loratool.merging.output_layout import ShardPlan
    from loratool.merging.plan import MergePlan

FORMAT = 1  # of what workers share
FINISHING = "--finish"
Look = Callable[["PartedMerge", Sequence[FilePart], Mapping[str, PartRecord], Progress | None], dict[str, str]]


@dataclass(frozen=True)
class PartedMerge:
    """A merge that is planned, with its parts and the place where they go."""

    plan: MergePlan
    out: Path
    paths: list[Path]  # of the adapters
    digests: list[dict[str, str]]  # of each adapter's files
    fingerprint: str
    parts: tuple[FilePart, ...]
    store: SharedFolder
    options: MergeOptions
    published: bool  # whether the output is there, complete

    @property
    def layouts(self) -> dict[str, Layout]:
        """The headers of the weight files."""
        return {shard.name: shard.layout for shard in self.plan.shards}

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.layout.size for shard in self.plan.shards)


@dataclass(frozen=True)
class PartDestination:
    """Where the engine sends parts: each is a file of its plan."""

    store: PartStore
    parts: Mapping[str, FilePart]

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        return {}

    def rounds(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        return [names]

    def open(self, name: str, layout: Layout, stop: threading.Event) -> Sink:
        return self.store.open(self.parts[name], layout, stop)


@dataclass(frozen=True)
class Joined:
    """Weight files that are complete, as a destination that has nothing left to do."""

    finished: Mapping[str, FinishedShard]

    def rounds(self, names: Sequence[str]) -> Iterable[Sequence[str]]:
        return [names]

    def open(self, name: str, layout: Layout, stop: threading.Event) -> Sink:
        raise NotImplementedError


def open_parts(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> PartedMerge:
    """The plan of a merge with its parts; nothing is written.

    Raises as `merge` does.
    """
    plan, target, paths = prepare(base, adapters, out, dataclasses.replace(options, overwrite=True))
    digests = [adapter.digests() for adapter in plan.adapters]
    fingerprint = content_fingerprint(plan, digests)
    published = is_published(target, fingerprint)
    if os.path.lexists(target) and not published and not options.overwrite:
        raise UsageError(f"{printable(out)} already exists; pass --overwrite to replace it", hint="--overwrite")
    parts = parts_of(plan)
    shared = {"format": FORMAT, "page": PAGE, "count": len(parts)}
    journal = Journal(fingerprint, {}, output_names(plan), parts=shared)
    store = SharedFolder(stage_of(target), journal, {part.name: part for part in parts})
    return PartedMerge(plan, target, paths, digests, fingerprint, parts, store, options, published)


def is_published(out: Path, fingerprint: str) -> bool:
    """Whether an output was made by the merge of that fingerprint."""
    path = sidecar_of(out) if is_file(out) else out / PROVENANCE
    try:
        return read_json(path, LARGEST_RECORD, lenient=True).get("plan") == fingerprint
    except LoratoolError:
        return False


def merge_part(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    share: Share,
    progress: Progress | None = None,
) -> PartReport:
    """Do one worker's share of a merge; `loratool.commands.merge` says all of it."""
    started = time.monotonic()
    merge = open_parts(base, adapters, out, options)
    return make_parts(merge, share_of(merge.parts, share), str(share), progress, started)


def make_parts(
    merge: PartedMerge,
    parts: Sequence[FilePart],
    share: str,
    progress: Progress | None = None,
    started: float | None = None,
) -> PartReport:
    """Make some parts of a merge, each at most once; those that are there, with the right bytes, are kept.

    Args:
        merge: from `open_parts`.
        parts: some of its parts.
        share: what they are called together, for people.
        progress: called with (bytes done, total bytes).
        started: when the work began, by `time.monotonic`.
    """
    started = time.monotonic() if started is None else started
    report = PartReport(merge.out, share, merge.fingerprint, (), (), {}, 0, True, ())
    if merge.published:
        return dataclasses.replace(report, cost=Cost(seconds=time.monotonic() - started, peak_memory=peak_memory()))
    check_values(merge.plan)
    needed = sum(part.size for part in parts if merge.store.read(part.name) is None)
    try:
        check_space(merge.out.parent, needed)
        merge.store.claim()
        with Presence(merge.store.home / PARTS, share) as presence:
            merge.store.presence = presence
            return made(merge, parts, report, progress, started)
    except FileNotFoundError as error:
        if not is_published(merge.out, merge.fingerprint):
            raise storage_error(error, merge.out, needed) from error
        return dataclasses.replace(report, cost=Cost(seconds=time.monotonic() - started, peak_memory=peak_memory()))
    except OSError as error:
        raise storage_error(error, merge.out, needed) from error


def made(
    merge: PartedMerge, parts: Sequence[FilePart], report: PartReport, progress: Progress | None, started: float
) -> PartReport:
    """Make those of some parts that are not there."""
    records = merge.store.records()
    there = [part for part in parts if part.name in records]
    redone = {name: reason for name, reason in problems(merge, there, records).items() if reason}
    for name in redone:
        merge.store.forget(name)
    todo = [part for part in parts if part.name not in records or part.name in redone]
    plan = plan_of(merge.plan, todo)
    notes = tuple(plan.check_packed(plan.spans))
    runtime = runtime_for(plan.spans, merge.options.device)
    if todo:
        job = Job(plan, PartDestination(merge.store, {part.name: part for part in todo}), apart=True)
        engine = Engine([job], runtime, merge.options.threads, merge.options.max_memory, progress)
        engine.run()
        if job.failure is not None:
            raise job.failure
    return dataclasses.replace(
        report,
        made=tuple(part.name for part in todo),
        kept=tuple(part.name for part in there if part.name not in redone),
        redone=redone,
        bytes_written=sum(part.size for part in todo),
        published=False,
        notes=notes,
        cost=cost(runtime, started),
    )


def problems(
    merge: PartedMerge,
    parts: Sequence[FilePart],
    records: Mapping[str, PartRecord],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Of some parts that have records, by name: empty, or what is wrong. All of their bytes are read, on all cores."""
    layouts, total, done, lock = merge.layouts, sum(part.size for part in parts), [0], threading.Lock()

    def look(part: FilePart) -> str:
        try:
            reason = merge.store.problem(part, records[part.name], layouts[part.file])
        except (LoratoolError, OSError) as error:  # a disk with a bad block, say
            reason = f"cannot be read: {error}"
        with lock:
            done[0] += part.size
            if progress is not None:
                progress(done[0], total)
        return reason

    with ThreadPoolExecutor(cores()) as pool:
        return dict(zip((part.name for part in parts), pool.map(look, parts), strict=True))


def merge_status(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> PartsStatus:
    """How far a merge in parts is; nothing is written and no weights are read."""
    merge = open_parts(base, adapters, out, options)
    records = {} if merge.published or merge.store.check() is None else merge.store.records()
    running = [] if merge.published else workers_in(merge.store.home / PARTS)
    return PartsStatus(
        out=merge.out,
        plan=merge.fingerprint,
        published=merge.published,
        parts=len(merge.parts),
        done={name: record.worker for name, record in records.items()},
        missing=() if merge.published else tuple(part.name for part in merge.parts if part.name not in records),
        running=tuple(Running(str(each), each.share, each.doing, each.seconds, each.alive) for each in running),
        bytes_done=merge.size if merge.published else sum(p.size for p in merge.parts if p.name in records),
        bytes_all=merge.size,
    )


def finish(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> FinishReport:
    """Put the parts of a merge together and publish the output; `loratool.commands.merge` says all of it."""
    started = time.monotonic()
    return publish(open_parts(base, adapters, out, options), progress, started)


def publish(merge: PartedMerge, progress: Progress | None, started: float, look: Look | None = None) -> FinishReport:
    """Publish a merge from `open_parts`, which began at `started`; `look` reads all bytes in the place of `problems`."""
    done = FinishReport(merge.out, merge.fingerprint, len(merge.parts), (), False, None)
    folder = merge.store.home / PARTS
    try:
        found = merge.store.check()
        if merge.published or is_published(merge.out, merge.fingerprint):  # perhaps since the merge was opened
            if found is not None:  # of a run that was killed after it had published
                remove_stage(Stage(merge.out, merge.store.home, found))
            return done
        if found is None or not folder.is_dir():
            raise VerificationError(f"{printable(merge.out)}: no part of this merge has been made; run --part first")
        with Presence(folder, FINISHING) as presence, alone(folder, presence) as check_alone:
            records = complete(merge, progress, look or problems)
            stage = Stage(merge.out, merge.store.home, found, single=single_name(merge))
            merged = put_together(merge, stage, records)
            check_alone()
            stage.publish(replaceable(merge.options.overwrite))
            took = Cost(kind_of_device(stage), time.monotonic() - started, peak_memory=peak_memory())
            report = make_report(merged, stage, (), took, len(workers_of(records)), Profile({}))
            remove_stage(stage)
    except (OSError, LoratoolError) as error:
        if is_published(merge.out, merge.fingerprint):  # by another one, at the same time
            return done
        raise storage_error(error, merge.out, 0) if isinstance(error, OSError) else error from None
    return dataclasses.replace(done, workers=workers_of(records), published=True, merge=report, cost=report.cost)


def kind_of_device(stage: Stage) -> str:
    """The kind of device that edited weights were computed on: the GPU where any was."""
    return "cuda" if any(shard.device == "cuda" for shard in stage.finished.values()) else "cpu"


def single_name(merge: PartedMerge) -> str:
    """The name of the file that is published, where the output is a file."""
    return merge.out.name if is_file(merge.out) else ""


def workers_of(records: Mapping[str, PartRecord]) -> tuple[str, ...]:
    return tuple(sorted({record.worker for record in records.values()}))


def complete(merge: PartedMerge, progress: Progress | None, look: Look) -> dict[str, PartRecord]:
    """The records of all parts, once every byte was read and found to be right.

    Raises `VerificationError` naming the parts that are missing, and those that are damaged, whose records go.
    """
    records = merge.store.records()
    if missing := [part.name for part in merge.parts if part.name not in records]:
        raise VerificationError(
            f"{printable(merge.out)}: not published: {len(missing)} of {len(merge.parts)} parts are not made; run the "
            "workers that are missing, or all that is left with --part 1/1; see --status:",
            missing,
        )
    refuse_strays(merge)
    for part in merge.parts:
        merge.store.put_edges(part, records[part.name])
    for shard in merge.plan.shards:
        with suppress(FileNotFoundError):  # which is told below
            forget_cached(merge.store.folder / shard.name)
    damaged = {name: why for name, why in look(merge, merge.parts, records, progress).items() if why}
    for name in damaged:
        merge.store.forget(name)
    if damaged:
        raise VerificationError(
            f"{printable(merge.out)}: not published: {len(damaged)} of {len(merge.parts)} parts are damaged; their records "
            "were removed, and --part 1/1 makes them again:",
            [f"{name}: {why}" for name, why in damaged.items()],
        )
    return records


def refuse_strays(merge: PartedMerge) -> None:
    """Raise `UsageError` where a worker is still making a part whose bytes may come out differently."""
    inexact = {part.name for part in merge.parts if part.work.keys() & {"formula", "compensated", "repack"}}
    for worker in workers_in(merge.store.home / PARTS):
        if worker.alive and (again := inexact & {*worker.doing}):
            raise UsageError(
                f"{printable(merge.out)}: {printable(str(worker))} is still making {', '.join(sorted(again))}; wait for it "
                "to end, or stop it"
            )


def put_together(merge: PartedMerge, stage: Stage, records: Mapping[str, PartRecord]) -> Merged:
    """Write everything but the weights; what is to be said of the merge."""
    plan, options = merge.plan, merge.options
    full = options.digests == "full"
    known = None if full else KnownDigests(plan.base.root)
    for shard in plan.shards:
        own = [(part, records[part.name]) for part in merge.parts if part.file == shard.name]
        finished = joined(shard, own, known)
        sha256 = sha256_of(stage.folder / shard.name) if options.sha256 else ""
        stage.keep(dataclasses.replace(finished, digest=dataclasses.replace(finished.digest, sha256=sha256)))
    job = Job(plan, Joined(stage.finished), known)
    resources = Resources((kind_of_device(stage),), len(workers_of(records)), 0)
    unchanged = f"{printable(merge.out)}: not written, {NOTHING}"
    merged = describe(job, resources, merge.digests, repeated(plan, merge.paths, options), unchanged)
    merged.table["base"] |= told_model(plan.base, ModelDigests.of(plan.base, compute=full))
    merged.table["plan"] = merge.fingerprint
    single = bool(stage.single)
    for name in (PROVENANCE, CARD, *(file.name for file in plan.side_files)):  # of a run that was killed here
        (stage.folder / name).unlink(missing_ok=True)
    write_small_files(stage, plan, () if single else plan.side_files, merged.table, card=not single)
    return merged


def joined(shard: ShardPlan, parts: Sequence[tuple[FilePart, PartRecord]], known: KnownDigests | None) -> FinishedShard:
    """A weight file, from the records of all of its parts."""
    empty = (digest_of_part(b""),)
    listed: dict[str, list[str]] = {}
    for part, record in parts:
        for (tensor, _, _), own in zip(part.chunks, record.chunk_digests(), strict=True):
            listed.setdefault(tensor, []).append(own)
    every: dict[str, Listed] = {}
    for span in shard.spans:
        name = span.placed.name[len(shard.prefix) :]
        reference = known_of(known, span)
        every[name] = reference if isinstance(reference, Reference) else tuple(listed.get(name, ())) or empty
    digest = Digest(shard.layout.size, tree=Tree.of(shard.layout, every))
    return FinishedShard(name=shard.name, digest=digest, **vars(together([record.seen for _, record in parts])))


def together(seen: Sequence[Seen]) -> Seen:
    """What was seen of all parts of a file."""
    nonfinite: dict[str, int] = {}
    for each in seen:
        for name, count in each.nonfinite.items():
            nonfinite[name] = nonfinite.get(name, 0) + count
    return Seen(
        changed=any(each.changed for each in seen),
        device=max((each.device for each in seen), default=""),  # "cuda" where any was
        norms=summed(each.norms for each in seen),
        kept=summed(each.kept for each in seen),
        lost={name: pair for each in seen for name, pair in each.lost.items()},
        nonfinite=nonfinite,
        effective=sorted({effect for each in seen for effect in each.effective}),
    )


def abort(out: PathLike) -> AbortReport:
    """Remove the stage of a merge in parts beside a local output; `loratool.abort_merge` says all of it."""
    target = Path(os.path.realpath(out))
    home = stage_of(target)
    found = check_stage(home)
    if found is None or found.parts is None:
        raise UsageError(f"{printable(out)}: no unfinished merge in parts was found, so nothing was removed")
    if alive := [worker for worker in workers_in(home / PARTS) if worker.alive]:
        raise UsageError(
            f"{printable(out)}: not aborted, because workers are running; stop them first: "
            f"{', '.join(printable(str(worker)) for worker in alive)}"
        )
    removed = sorted(name for name in found.files if (home / MODEL / name).is_file())
    remove_stage(Stage(target, home, found))
    return AbortReport(target, found.plan, is_published(target, found.plan), (), tuple(removed))
