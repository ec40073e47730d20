"""A merge into an object store by one process: what no edit touches is copied there, all else is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.errors import FitError, StoreError, printable
from loratool.files.digests import read_recorded
from loratool.files.folders import PROVENANCE
from loratool.files.part_records import PublishedError
from loratool.merging.in_parts import IncompleteError, make, making, publish, result_of
from loratool.merging.merge import Making
from loratool.merging.merge_options import MergeOptions
from loratool.merging.parted_merge import PartedMerge, open_parts
from loratool.merging.reporting import cost
from loratool.merging.resources import runtime_for
from loratool.notes import Note
from loratool.results.base import Cost
from loratool.results.merge import MergeReport
from loratool.stores.begun import read_record
from loratool.stores.bucket import Bucket

if TYPE_CHECKING:
    from concurrent.futures import Future

    from loratool.devices import Runtime

MOST_TRIES = 3  # of parts that were found wrong when they were put together
WHOLE = "1/1"  # the share of a process that makes all parts


def merge_into_store(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge into a store; `loratool.commands.merge` says all of it. Raises as `merge` does."""
    merge = open_parts(base, adapters, out, options, joining=False)
    runtime = runtime_for(merge.plan.spans, options)
    return result_of(making_in_store(merge, runtime), merge, runtime, progress)


def making_in_store(merge: PartedMerge, runtime: Future[Runtime]) -> Making[MergeReport]:
    """Make an output in a store, as a generator: it gives its job, and is to be sent the engine that has run it."""
    try:
        made = yield from making(merge, merge.parts, WHOLE, runtime)
        report = published(merge)
    except PublishedError:  # by an earlier run, or by another one at the same time
        return complete_already(merge)
    left = {part.file for part in merge.parts if part.name in made.made}
    return dataclasses.replace(
        report,
        resumed=tuple(shard.name for shard in merge.plan.shards if shard.name not in left),
        workers=made.workers,
        profile=made.profile,
        cost=cost(runtime, merge.started),
    )


def published(merge: PartedMerge) -> MergeReport:
    """Publish a merge whose parts were made; those that are found wrong are made again."""
    for number in range(MOST_TRIES):
        try:
            found = publish(merge)
        except IncompleteError as error:
            if number == MOST_TRIES - 1:
                raise StoreError(
                    f"{printable(merge.output.out)}: parts of its uploads keep changing; is another run using it?",
                    error.problems,
                ) from None
            make(merge, merge.parts, WHOLE)
        except FitError:  # which no other run could do anything about
            merge.output.abort()
            raise
        else:
            if found.merge is not None:
                return found.merge
            break
    raise PublishedError


def complete_already(merge: PartedMerge) -> MergeReport:
    """The report of a merge whose record is there; what its making left goes."""
    bucket, plan = merge.output, merge.plan
    assert isinstance(bucket, Bucket)
    bucket.clear()
    recorded = read_recorded(read_record(bucket.path(PROVENANCE)))
    text = "another run had completed this output; only leftovers were removed"
    return MergeReport(
        out=bucket.out,
        edited=len(plan.edited),
        adapters=(),
        copied=plan.copied,
        converted=plan.converted,
        bytes_read=0,
        bytes_written=0,
        workers=0,
        resumed=tuple(shard.name for shard in plan.shards),
        left_out=plan.left_out,
        notes=(*plan.notes, Note("complete-already", text)),
        digests={s.name: str(recorded[s.name]) for s in plan.shards if s.name in recorded},
        cost=Cost.since(merge.started),
    )
