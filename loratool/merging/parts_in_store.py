"""A merge into a store that many machines make together: `--part`, `--finish` and `--status` of such an OUT."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import VerificationError
from loratool.files.process import peak_memory
from loratool.merging.dealing import share_of
from loratool.merging.in_store import (
    Made,
    StoredMerge,
    finish as publish_all,
    is_committed,
    make,
    open_store,
    ready,
    wrong_parts,
)
from loratool.merging.merge import MergeOptions, PathLike, Progress, cost
from loratool.results.base import Cost
from loratool.results.parts import FinishReport, PartReport, PartsStatus
from loratool.results.profile import Profile
from loratool.stores.bucket import read_begun
from loratool.stores.client import GoneError
from loratool.stores.upload_part import UploadPart

if TYPE_CHECKING:
    from loratool.options.sharing import Share


def merge_part(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    share: Share,
    progress: Progress | None = None,
) -> PartReport:
    """Do one worker's share of a merge into a store; `loratool.merge_part` says all of it."""
    merge = open_store(base, adapters, out, options, joining=True)
    place = Path(str(merge.place))
    parts = [merge.bucket.parts[part.name] for part in share_of(merge.parts, share)]
    report = PartReport(place, str(share), merge.fingerprint, (), (), {}, 0, True, ())
    if merge.committed:
        return dataclasses.replace(report, cost=spent(merge))
    runtime = ready(merge)
    merge.bucket.claim()
    records = merge.bucket.records()
    there = [part for part in parts if part.name in records]
    try:
        wrong = wrong_parts(merge, there)
        for name in wrong:
            merge.bucket.forget(name)
        make(merge, parts, runtime, progress)
    except GoneError:
        if not is_committed(merge.place, merge.fingerprint):
            raise
        return dataclasses.replace(report, cost=spent(merge))
    made = [part for part in parts if part.name not in records or part.name in wrong]
    return dataclasses.replace(
        report,
        made=tuple(part.name for part in made),
        kept=tuple(part.name for part in there if part.name not in wrong),
        redone=wrong,
        bytes_written=sum(part.size for part in made),
        published=False,
        cost=cost(runtime, merge.started),
    )


def finish(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,  # noqa: ARG001 (the store compares)
) -> FinishReport:
    """Publish a merge into a store whose parts have all been made; `loratool.finish_merge` says all of it."""
    merge = open_store(base, adapters, out, options, joining=True)
    done = FinishReport(Path(str(merge.place)), merge.fingerprint, len(merge.parts), (), False, None)
    if merge.committed:
        merge.bucket.clear()
        return done
    if read_begun(merge.place) is None:
        raise VerificationError(f"{merge.place}: no part of this merge has been made; run --part first")
    merge.bucket.claim()
    try:
        if wrong := wrong_parts(merge, merge.parts):
            raise VerificationError(
                f"{merge.place}: not published: {len(wrong)} of {len(merge.parts)} parts are missing or damaged; --part 1/1 "
                "makes what is left:",
                [f"{name}: {why}" for name, why in wrong.items()],
            )
        report = publish_all(merge, lambda: spent(merge), Made((), 0, Profile({})))
    except (GoneError, VerificationError):
        if is_committed(merge.place, merge.fingerprint):  # by another one, at the same time
            return done
        raise
    workers = tuple(sorted({record.worker for record in merge.bucket.made.values()}))
    merged = dataclasses.replace(report, workers=len(workers))
    return dataclasses.replace(done, workers=workers, published=True, merge=merged, cost=report.cost)


def merge_status(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> PartsStatus:
    """How far a merge into a store is, by its records; a store does not tell who is at work."""
    merge = open_store(base, adapters, out, options, joining=True)
    records = {} if merge.committed else merge.bucket.records()
    size = size_of(merge.parts)
    return PartsStatus(
        out=Path(str(merge.place)),
        plan=merge.fingerprint,
        published=merge.committed,
        parts=len(merge.parts),
        done={name: record.worker for name, record in records.items()},
        missing=() if merge.committed else tuple(part.name for part in merge.parts if part.name not in records),
        running=(),
        bytes_done=size if merge.committed else size_of([part for part in merge.parts if part.name in records]),
        bytes_all=size,
    )


def size_of(parts: Sequence[UploadPart]) -> int:
    return sum(part.size for part in parts)


def spent(merge: StoredMerge) -> Cost:
    """What a command that computes nothing has cost so far."""
    return Cost(seconds=time.monotonic() - merge.started, peak_memory=peak_memory())
