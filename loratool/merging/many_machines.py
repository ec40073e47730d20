"""A merge that many machines make, wherever OUT is: in a folder that all of them see, or in a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.merging import in_parts, in_store, parts_in_store
from loratool.merging.merge import MergeOptions, PathLike, Progress
from loratool.stores.names import is_in_store

if TYPE_CHECKING:
    from loratool.options.sharing import Share
    from loratool.results.abort import AbortReport
    from loratool.results.parts import FinishReport, PartReport, PartsStatus


def merge_part(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    share: Share,
    progress: Progress | None = None,
) -> PartReport:
    """Do one worker's share of a merge."""
    if is_in_store(out):
        return parts_in_store.merge_part(base, adapters, out, options, share, progress)
    return in_parts.merge_part(base, adapters, out, options, share, progress)


def finish(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    options: MergeOptions,
    progress: Progress | None = None,
) -> FinishReport:
    """Publish a merge whose parts have all been made."""
    if is_in_store(out):
        return parts_in_store.finish(base, adapters, out, options, progress)
    return in_parts.finish(base, adapters, out, options, progress)


def abort(out: PathLike) -> AbortReport:
    """Remove what an unfinished merge left."""
    return in_store.abort(out) if is_in_store(out) else in_parts.abort(out)


def merge_status(
    base: PathLike, adapters: Sequence[PathLike] | PathLike, out: PathLike, options: MergeOptions
) -> PartsStatus:
    """How far a merge in parts is."""
    if is_in_store(out):
        return parts_in_store.merge_status(base, adapters, out, options)
    return in_parts.merge_status(base, adapters, out, options)
