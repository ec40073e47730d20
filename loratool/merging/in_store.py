"""A merge whose output is a prefix of an object store: what no edit touches is copied there, all else is sent.

    open_store   plan, cut files for uploads in parts, look at what is below the prefix      nothing is written
    make         the parts that are not there: copies by the store, and the engine's
    finish       weights get their names, then config and the like, the index, `loratool.json`

Any worker may make any part, at any time, twice too. Whoever reads the prefix finds a complete model, or is told that
there is none yet. After an interruption the same call goes on with what the store has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.devices import resident_memory
from loratool.errors import FitError, InputError, StoreError, UsageError, VerificationError, printable
from loratool.fetching import local
from loratool.files import stopwatch
from loratool.files.checkpoint import INDEX_SUFFIX, PROVENANCE
from loratool.files.digests import read_recorded
from loratool.files.inputs import LARGEST_RECORD, json_object
from loratool.files.known_digests import KnownDigests
from loratool.files.part_records import PartRecord
from loratool.files.process import peak_memory
from loratool.files.staging import Stage, workplace
from loratool.merging.dealing import plan_of
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint
from loratool.merging.in_parts import Joined, PartDestination
from loratool.merging.merge import (
    NOTHING,
    Merged,
    MergeOptions,
    PathLike,
    Progress,
    check_values,
    cost,
    describe,
    located,
    make_report,
    output_names,
    planned,
    read_inputs,
    repeated,
    several,
    write_small_files,
)
from loratool.merging.one_file import is_file
from loratool.merging.resources import Resources, choose_resources, runtime_for
from loratool.merging.stored_records import whole_file
from loratool.merging.tasks import Job
from loratool.merging.upload_parts import upload_parts
from loratool.notes import Note
from loratool.provenance.inputs import ModelDigests, told_model
from loratool.results.abort import AbortReport
from loratool.results.base import Cost
from loratool.results.merge import MergeReport
from loratool.results.profile import Profile
from loratool.stores import uploads
from loratool.stores.bucket import FINISH, FOLDER, Begun, Bucket, changed, each_of, read_begun, remove_all
from loratool.stores.client import GoneError
from loratool.stores.limits import limits
from loratool.stores.names import StorePath, parse_store
from loratool.stores.objects import StoredObject, listed
from loratool.stores.upload_part import UploadPart

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.devices import Runtime
    from loratool.merging.plan import MergePlan

MOST_LOOKS = 4  # at an object, until an answer has its ETag: one answer may be wrong
MOST_TRIES = 3  # of parts that were found wrong when they were put together


@dataclass(frozen=True)
class StoredMerge:
    """A merge into a store that is planned."""

    plan: MergePlan
    place: StorePath
    paths: list[Path]  # of the adapters
    digests: list[dict[str, str]]  # of each adapter's files
    fingerprint: str
    parts: tuple[UploadPart, ...]
    bucket: Bucket
    options: MergeOptions
    committed: bool  # whether its record is there, which comes last
    started: float


def merge_into_store(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge into a prefix of a store; `loratool.commands.merge` says all of it."""
    merge = open_store(base, adapters, out, options)
    if merge.committed:
        return complete_already(merge)
    runtime = ready(merge)
    merge.bucket.claim()
    try:
        if is_committed(merge.place, merge.fingerprint):
            return complete_already(merge)
        return completed(merge, runtime, progress)
    except (GoneError, VerificationError) as error:
        if is_committed(merge.place, merge.fingerprint):  # by another run, at the same time
            return complete_already(merge)
        if isinstance(error, GoneError):
            raise StoreError(
                f"{merge.place}: its uploads were removed by something else, such as a rule of the bucket; remove what is "
                "left with --abort, then merge again"
            ) from None
        raise


def ready(merge: StoredMerge) -> Future[Runtime]:
    """What makes the parts, on its way; raises what stands against the merge before anything is written."""
    plan, options = merge.plan, merge.options
    check_values(plan)
    runtime = runtime_for(plan.spans, options.device)
    if (limit := options.max_memory) is not None:
        devices = runtime.result().devices
        choose_resources(plan.spans, devices, options.threads, limit, resident_memory(), most_sent(merge))
    return runtime


def most_sent(merge: StoredMerge) -> int:
    """Bytes that a worker may hold of what it sends: the piece that it fills, and one that another one fills up."""
    return 2 * max((piece.size for part in merge.parts if part.source is None for piece in part.pieces), default=0)


def completed(merge: StoredMerge, runtime: Future[Runtime], progress: Progress | None) -> MergeReport:
    """Make all parts, those again that are found wrong, and publish the output."""
    made = make(merge, merge.parts, runtime, progress)
    for number in range(MOST_TRIES):
        wrong = wrong_parts(merge, merge.parts)
        if not wrong:
            break
        if number == MOST_TRIES - 1:
            raise StoreError(
                f"{merge.place}: parts of its uploads keep changing; is another run using it?",
                [f"{name}: {why}" for name, why in wrong.items()],
            )
        for name in wrong:
            merge.bucket.forget(name)
        make(merge, [merge.bucket.parts[name] for name in wrong], runtime, progress)
    return finish(merge, lambda: cost(runtime, merge.started), made)


def open_store(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    joining: bool = False,
) -> StoredMerge:
    """The plan of a merge into a store with its parts; nothing is written.

    With `joining`, one that is complete already is no output that is in the way.

    Raises:
        UsageError: what is below the prefix may not be replaced, is an input, or is a merge of something else.
        StoreError: the store refuses, or is out of reach.
        LoratoolError: as for `merge`.
    """
    started = time.monotonic()
    place = checked_place(out, options)
    words = several(adapters)
    ways = options.readings(max(1, len(words)))
    apart_from_inputs(place, [base, *words])
    base, paths = located(base, words)
    apart_from_inputs(place, [base])
    plan = planned(*read_inputs(local(base, "model"), paths, ways), options)
    plan = dataclasses.replace(plan, notes=(*plan.notes, *plan.check_packed(plan.spans)))
    digests = [adapter.digests() for adapter in plan.adapters]
    fingerprint = content_fingerprint(plan, digests)
    parts = upload_parts(plan, limits())
    named = json.dumps([[part.name, part.file, part.cuts, part.source is None] for part in parts]).encode()
    weights = tuple(shard.name for shard in plan.shards)
    others = tuple(sorted(output_names(plan) - {*weights}))
    begun = Begun(fingerprint, hashlib.sha256(named).hexdigest(), weights, others)
    bucket = Bucket(place, begun, {part.name: part for part in parts})
    if joining and read_begun(place) is None and is_committed(place, fingerprint):
        return StoredMerge(plan, place, paths, digests, fingerprint, parts, bucket, options, True, started)
    begun, committed = settled(bucket, options.overwrite)
    bucket.begun = begun
    return StoredMerge(plan, place, paths, digests, fingerprint, parts, bucket, options, committed, started)


def checked_place(out: PathLike, options: MergeOptions) -> StorePath:
    """The prefix that OUT names; raises `UsageError` for what no prefix can be, and for options of a local OUT."""
    place = parse_store(out)
    if place is None:
        raise UsageError(f"{printable(out)}: not an address in a store")
    if not place.key:
        raise UsageError(f"{place}: OUT must be a prefix in a bucket, such as {place / 'merged'}")
    if is_file(Path(place.name)):
        raise UsageError(f"{place}: OUT in a store must be a prefix, such as {place.parent / Path(place.name).stem}")
    _ = options.threads  # raises where a cluster was asked for
    if options.verify or options.sha256:
        raise UsageError(
            "--verify and --sha256 read a local output again; for OUT in a store, run `loratool verify OUT` after the merge"
        )
    return place


def apart_from_inputs(place: StorePath, inputs: Sequence[PathLike]) -> None:
    """Raise `UsageError` where an output is, contains or lies in an input."""
    for each in inputs:
        there = parse_store(each)
        if there is None or there.bucket != place.bucket:
            continue
        if place.prefix.startswith(there.prefix) or there.prefix.startswith(place.prefix):
            raise UsageError(
                f"{place}: OUT is, contains or is inside the input {there}, which loratool never writes to; choose "
                "another OUT"
            )


def settled(bucket: Bucket, overwrite: bool) -> tuple[Begun, bool]:
    """What is to be begun, or goes on; and whether it is committed already, so that only clearing up is left.

    Raises `UsageError` where what is below the prefix may not be replaced.
    """
    place, wanted = bucket.place, bucket.begun
    if (begun := read_begun(place)) is not None:
        bucket.check(begun)
        return begun, is_committed(place, wanted.plan)
    there = {name: each for name, each in listed(place).items() if not name.startswith(f"{FOLDER}/")}
    if not there:
        return wanted, False
    if not overwrite:
        raise UsageError(f"{place} already exists; pass --overwrite to replace it", hint="--overwrite")
    return dataclasses.replace(wanted, replaces=tuple(sorted(replaceable_in(place, there)))), False


def is_committed(place: StorePath, plan: str) -> bool:
    """Whether the record of a merge is there, which comes last."""
    raw = uploads.get(place / PROVENANCE)
    return raw is not None and record_in(raw).get("plan") == plan


def record_in(raw: bytes) -> dict[str, Any]:
    """A record as a table; empty where it cannot be read."""
    try:
        return json_object(raw[: LARGEST_RECORD + 1], lenient=True)
    except (ValueError, InputError):
        return {}


def replaceable_in(place: StorePath, there: Mapping[str, StoredObject]) -> list[str]:
    """The names of all objects below a prefix, which its own record lists.

    Raises `UsageError` where it has no record, or has other objects too.
    """
    recorded = read_recorded(record_in(uploads.get(place / PROVENANCE) or b""))
    odd = {
        name: "not listed" if name not in recorded else "has another size than is listed"
        for name, each in there.items()
        if name != PROVENANCE and (name not in recorded or recorded[name].size != each.size)
    }
    if odd or PROVENANCE not in there:
        raise UsageError(
            f"{place}: contains objects that its own {PROVENANCE} does not list, so --overwrite does not replace it; "
            "remove them, or choose another OUT:",
            (f"{printable(name)}: {why}" for name, why in sorted(odd.items())),
        )
    return [*there]


@dataclass(frozen=True)
class Made:
    """What is to be said of the making of parts."""

    resumed: tuple[str, ...]  # files of which nothing was left to do
    workers: int
    profile: Profile


def make(merge: StoredMerge, parts: Sequence[UploadPart], runtime: Future[Runtime], progress: Progress | None) -> Made:
    """Make those of some parts that are not in the store."""
    bucket, layouts = merge.bucket, {shard.name: shard.layout for shard in merge.plan.shards}
    records = bucket.records()
    todo = [part for part in parts if part.name not in records]
    plain = [part for part in todo if not part.chunks]
    each_of(lambda part: bucket.make_plain(part, layouts[part.file]), plain)
    workers, profile = 0, Profile({})
    if computed := [part for part in todo if part.chunks]:
        plan = plan_of(merge.plan, computed)
        job = Job(plan, PartDestination(bucket, {part.name: part for part in computed}), apart=True)
        options = merge.options
        engine = Engine([job], runtime, options.threads, options.max_memory, progress, most_sent(merge))
        engine.run()
        if job.failure is not None:
            raise job.failure
        workers, profile = engine.resources().workers, Profile(stopwatch.together(engine.watches))
    left = {part.file for part in todo}
    return Made(tuple(shard.name for shard in merge.plan.shards if shard.name not in left), workers, profile)


def wrong_parts(merge: StoredMerge, parts: Sequence[UploadPart]) -> dict[str, str]:
    """What is wrong with some parts, by their names, from the store's own lists; the records are kept for `finish`."""
    bucket = merge.bucket
    records = bucket.records()
    try:
        bucket.look()
    except GoneError:  # another run completes them
        bucket.made = records
        return {}
    layouts = {shard.name: shard.layout for shard in merge.plan.shards}
    found = {
        part.name: bucket.problem(part, records[part.name], layouts[part.file])
        if part.name in records
        else "is not made"
        for part in parts
    }
    bucket.made = records
    return {name: why for name, why in found.items() if why}


def finish(merge: StoredMerge, spent: Callable[[], Cost], made: Made) -> MergeReport:
    """Give the files of the output their names, its record last; then remove what only the making needed."""
    bucket, place = merge.bucket, merge.place
    records = bucket.made
    if missing := [part.name for part in merge.parts if part.name not in records]:
        raise VerificationError(
            f"{place}: not published: {len(missing)} of {len(merge.parts)} parts are not made:", missing
        )
    check_sources(merge.parts)
    with tempfile.TemporaryDirectory(prefix="loratool-") as home, workplace(Path(home) / "merged") as stage:
        try:
            merged = put_together(merge, stage, records)
        except FitError:  # which no other run could do anything about
            abort(str(place))
            raise
        publish(merge, stage)
        bucket.clear()
        report = make_report(merged, stage, made.resumed, spent(), made.workers, made.profile)
    copied = sum(part.size for part in merge.parts if part.source is not None)
    return dataclasses.replace(report, out=Path(str(place)), notes=(*report.notes, *copied_notes(copied)))


def complete_already(merge: StoredMerge) -> MergeReport:
    """The report of a merge whose record is there, by an earlier run or by another one; what its making left goes."""
    merge.bucket.clear()
    plan, recorded = merge.plan, read_recorded(record_in(uploads.get(merge.place / PROVENANCE) or b""))
    text = "another run had completed this output; only what its making left was removed"
    return MergeReport(
        out=Path(str(merge.place)),
        edited=len(plan.edited),
        adapters=(),
        copied=plan.copied,
        converted=sum(not (span.edits or span.untouched or span.packed) for span in plan.spans),
        bytes_read=0,
        bytes_written=0,
        workers=0,
        gpu_memory=0,
        resumed=tuple(shard.name for shard in plan.shards),
        relative_norms={},
        gain=None,
        gains={},
        error_added=None,
        errors_added={},
        nonfinite={},
        left_out=plan.left_out,
        notes=(*plan.notes, Note("complete-already", text)),
        digests={s.name: str(recorded[s.name]) for s in plan.shards if s.name in recorded},
        cost=Cost(seconds=time.monotonic() - merge.started, peak_memory=peak_memory()),
    )


def copied_notes(size: int) -> Iterator[Note]:
    """That bytes of the output were never read here."""
    if size:
        text = f"{size} bytes were copied inside the store and not read here; `loratool verify` reads them"
        yield Note("copied-in-store", text)


def check_sources(parts: Sequence[UploadPart]) -> None:
    """Raise `InputError` where an object that was copied from is no longer the one that was listed.

    Some stores copy from whatever is there.
    """
    for source in {part.source for part in parts if part.source is not None}:
        if not any((uploads.head(source.place) or ("", 0))[0] == source.tag for _ in range(MOST_LOOKS)):
            raise changed(source)


def put_together(merge: StoredMerge, stage: Stage, records: Mapping[str, PartRecord]) -> Merged:
    """Write everything but the weights into a local stage; what is to be said of the merge."""
    plan, options = merge.plan, merge.options
    full = options.digests == "full"
    known = None if full else KnownDigests(plan.base.root)
    for shard in plan.shards:
        own = [(part, records[part.name]) for part in merge.parts if part.file == shard.name]
        stage.keep(whole_file(plan, shard, own, known))
    job = Job(plan, Joined(stage.finished), known)
    on_gpu = any(shard.device == "cuda" for shard in stage.finished.values())
    resources = Resources(("cuda:0",) if on_gpu else ("cpu",), 1, 0)
    unchanged = f"{merge.place}: not written, {NOTHING}"
    merged = describe(job, resources, merge.digests, repeated(plan, merge.paths, options), unchanged)
    merged.table["base"] |= told_model(plan.base, ModelDigests.of(plan.base, compute=full))
    merged.table["plan"] = merge.fingerprint
    write_small_files(stage, plan, plan.side_files, merged.table)
    return merged


def publish(merge: StoredMerge, stage: Stage) -> None:
    """Complete the uploads, then put the other files, the index after them, and the record last of all."""
    bucket, place = merge.bucket, merge.place
    uploads.put_new(bucket.home / FINISH, b"{}\n")
    weights = {shard.name: shard.layout.size for shard in merge.plan.shards}
    gone = [name for name in bucket.begun.replaces if name not in weights]
    for name in sorted(gone, key=lambda name: (name != PROVENANCE, not name.endswith(INDEX_SUFFIX))):
        uploads.remove(place / name)
    each_of(lambda name: bucket.complete(name, weights[name]), weights)
    small = [name for name in stage.files if name not in weights and name != PROVENANCE]
    for name in sorted(small, key=lambda name: (name.endswith(INDEX_SUFFIX), name)):
        uploads.put(place / name, (stage.folder / name).read_bytes())
    record = (stage.folder / PROVENANCE).read_bytes()
    if not uploads.put_new(place / PROVENANCE, record) and not is_committed(place, merge.fingerprint):
        raise UsageError(f"{place / PROVENANCE}: was written by something else in the meantime")


def abort(out: PathLike) -> AbortReport:
    """Remove what an unfinished merge left below a prefix; `loratool.abort_merge` says all of it."""
    place = parse_store(out)
    begun = read_begun(place) if place is not None else None
    if place is None or begun is None:
        raise UsageError(f"{printable(out)}: no unfinished merge was found, so nothing was removed")
    completed = is_committed(place, begun.plan)
    removed: list[str] = []
    if not completed and uploads.head(place / FOLDER / FINISH) is not None:
        there = listed(place)
        removed = sorted(name for name in {*begun.weights, *begun.others, *begun.replaces} if name in there)
        remove_all(place, removed)
    bucket = Bucket(place, begun, {})
    planned = bucket.planned()
    for name, upload in planned.items():
        uploads.abort(place / name, upload)
    ended = {*planned, *bucket.clear()}
    return AbortReport(
        Path(str(place)), begun.plan, completed, () if completed else tuple(sorted(ended)), tuple(removed)
    )
