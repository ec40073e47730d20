"""A merge that is planned to be made in parts, and the place of its output: a folder that all workers see, or a store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.adapters.formats import replaceable
from loratool.arguments import PathLike, several
from loratool.errors import InputError, UsageError, printable
from loratool.fetching.bases import told_choice
from loratool.fetching.stores import brought
from loratool.files.folders import PROVENANCE
from loratool.files.journal import Journal
from loratool.files.model_files import RECORD_KEY
from loratool.files.part_records import FilePart, SharedOutput
from loratool.files.shared_folder import SharedFolder
from loratool.files.sink import PAGE
from loratool.files.weight_formats import read_weight_file
from loratool.merging.dealing import parts_of
from loratool.merging.fingerprints import content_fingerprint
from loratool.merging.inputs import located, opened_inputs, planned
from loratool.merging.merge import prepare
from loratool.merging.merge_options import MergeOptions
from loratool.merging.one_file import as_one_file, is_file
from loratool.merging.plan import Plan
from loratool.merging.small_files import output_names
from loratool.merging.upload_parts import upload_parts
from loratool.stores import uploads
from loratool.stores.begun import Begun, replaceable_in
from loratool.stores.bucket import Bucket, file_of
from loratool.stores.limits import limits
from loratool.stores.names import FOLDER, StorePath, is_in_store, parse_store
from loratool.stores.objects import listed

FORMAT = 1  # of what workers share


@dataclass(frozen=True)
class PartedMerge:
    """A merge that is planned, with its parts and the place where they go."""

    plan: Plan
    paths: list[Path]  # of the adapters
    digests: list[dict[str, str]]  # of each adapter's files
    parts: tuple[FilePart, ...]
    output: SharedOutput
    options: MergeOptions
    published: bool  # whether the output is there, complete
    started: float  # when the work began, by `time.monotonic`

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(part.size for part in self.parts)

    @property
    def single(self) -> bool:
        """Whether the output is one file."""
        return is_file(self.output.out)


def open_parts(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions, joining: bool = True
) -> PartedMerge:
    """The plan of a merge with its parts; nothing is written.

    With `joining`, an output in a store that this merge has made already is not in the way; in a folder it never is.

    Raises:
        UsageError: as `merge` does; what is at `out` may not be replaced, or another merge is at work on it.
        StoreError: the store refuses, or is out of reach.
        LoratoolError: as `merge` does.
    """
    started = time.monotonic()
    _ = options.threads  # raises where a cluster was asked for
    if is_in_store(out):
        plan, paths = planned_for(checked_place(out), base, several(adapters), options)
        return stored(plan, paths, out, options, joining, started)
    plan, target, paths = prepare(base, adapters, out, dataclasses.replace(options, overwrite=True))
    digests = [adapter.digests() for adapter in plan.adapters]
    folder = folder_of(plan, target, content_fingerprint(plan, digests), options.overwrite)
    published = folder.is_published()
    if os.path.lexists(target) and not published and not options.overwrite:
        raise UsageError(f"{printable(out)} already exists; pass --overwrite to replace it", hint="--overwrite")
    if not published:
        folder.check()
    return PartedMerge(plan, paths, digests, tuple(folder.parts.values()), folder, options, published, started)


def stored(
    plan: Plan, paths: list[Path], out: PathLike, options: MergeOptions, joining: bool, started: float
) -> PartedMerge:
    """A merge into a store of a plan whose adapters are at `paths`; the rest is as for `open_parts`."""
    digests = [adapter.digests() for adapter in plan.adapters]
    bucket = bucket_of(plan, checked_place(out), content_fingerprint(plan, digests))
    published = bucket.settle(joining, lambda: replaced_at(bucket.address, options.overwrite))
    return PartedMerge(plan, paths, digests, tuple(bucket.parts.values()), bucket, options, published, started)


def folder_of(plan: Plan, target: Path, fingerprint: str, overwrite: bool) -> SharedFolder:
    """The output of a merge in a folder that all workers see."""
    parts = parts_of(plan)
    shared = {"format": FORMAT, "page": PAGE, "count": len(parts)}
    journal = Journal(fingerprint, {}, output_names(plan), parts=shared)
    layouts = {shard.name: shard.layout for shard in plan.shards}
    named = {part.name: part for part in parts}
    return SharedFolder(target, journal, named, layouts, replaceable(overwrite), is_file(target))


def bucket_of(plan: Plan, place: StorePath, fingerprint: str) -> Bucket:
    """The output of a merge in a store."""
    parts = upload_parts(plan, limits())
    named = json.dumps([[part.name, part.file, part.cuts, part.source is None] for part in parts]).encode()
    layouts = {shard.name: shard.layout for shard in plan.shards}
    begun = Begun(
        fingerprint,
        hashlib.sha256(named).hexdigest(),
        tuple(layouts),
        tuple(sorted(output_names(plan) - layouts.keys())),
    )
    prefix, single = split(place)
    return Bucket(prefix, begun, {part.name: part for part in parts}, layouts, single)


def split(place: StorePath) -> tuple[StorePath, str]:
    """The prefix below which the files of an output are, and the name of its one file; empty where it is a prefix."""
    return (place.parent, place.name) if is_file(Path(place.name)) else (place, "")


def replaced_at(place: StorePath, overwrite: bool) -> tuple[str, ...]:
    """The names of what is at an output in a store, and goes. Raises `UsageError` where it may not be replaced."""
    prefix, single = split(place)
    record = file_of(prefix, single, PROVENANCE)
    if single:
        heads = {name: uploads.head(file_of(prefix, single, name)) for name in (single, PROVENANCE)}
        there = {name: head[1] for name, head in heads.items() if head is not None}
        if overwrite and single in there and says_made_here(place):
            return tuple(there)
    else:
        there = {name: each.size for name, each in listed(prefix).items() if not name.startswith(f"{FOLDER}/")}
    return replaceable_in(place, there, record, overwrite)


def says_made_here(place: StorePath) -> bool:
    """Whether the header of an object has the record of a command that made it."""
    try:
        return RECORD_KEY in read_weight_file(brought(place, None)).metadata
    except InputError:
        return False


def unfinished(out: PathLike) -> SharedOutput:
    """What was begun at an output. Raises `UsageError` where there is no such thing."""
    if not is_in_store(out):
        return SharedFolder.unfinished(Path(os.path.realpath(out)), is_file(Path(out)))
    return Bucket.unfinished(*split(checked_place(out)))


def planned_for(
    place: StorePath, base: PathLike, adapters: Sequence[PathLike], options: MergeOptions
) -> tuple[Plan, list[Path]]:
    """The plan of a merge into a store, and the adapters' places on this disk."""
    apart_from_inputs(place, [base, *adapters])
    chosen, paths = located(base, adapters)
    apart_from_inputs(place, [chosen])  # before it is downloaded
    model, read, paths = opened_inputs(chosen, paths, options)
    return as_one_file(planned(told_choice(model, base, chosen), read, options), Path(str(place))), paths


def checked_place(out: PathLike) -> StorePath:
    """The place that an address of OUT names; raises `UsageError` for what no output can be."""
    place = parse_store(out)
    if place is None:
        raise UsageError(f"{printable(out)}: not an address in a store")
    if not place.key:
        raise UsageError(f"{place}: OUT must be a prefix in a bucket, such as {place / 'merged'}")
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
