"""`loratool merge --part`, `--finish` and `--status`: a merge that many machines make together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.merge import MergeAndPushOptions
from loratool.commands.publish import with_push
from loratool.merging import in_parts
from loratool.merging.merge_options import MergeOptions
from loratool.options.described import keyword_options, made_of
from loratool.options.sharing import Share
from loratool.results.parts import FinishReport, PartReport, PartsStatus

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import MergeKeywords, WholePlanKeywords


@keyword_options(MergeOptions)
def merge_part(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    part: str | Share,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[WholePlanKeywords],
) -> PartReport:
    """Do one worker's share of a merge into `out`, on a file system that all workers share or in a store.

    Nothing appears at `out` before `finish_merge` is called. A worker that died is started again by the same call, or by
    one with another number of workers; what is there with the right bytes is kept.

    Args:
        base: as for `merge`.
        adapters: as for `merge`, and alike for all workers.
        out: as for `merge`.
        part: which worker this is: "3/8" for the third of eight, "auto" or "auto/8" for what a scheduler has put into the
            environment.
        progress: called with (bytes done, total bytes) of this share.

    Raises:
        UsageError: as for `merge`; another merge is at work on `out`.
        InputError, FitError: as for `merge`.
        StorageError: a disk or file-system error; what is done so far is kept.
    """
    options = made_of(MergeOptions, keywords, "merge_part")
    return in_parts.merge_part(base, adapters, out, options, Share.of(part), progress)


@keyword_options(MergeAndPushOptions)
def finish_merge(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[MergeKeywords],
) -> FinishReport:
    """Publish a merge whose parts have all been made by `merge_part` with the same arguments.

    Every byte is read again and compared with its digest. Where `out` is complete already, nothing happens.

    Args:
        base: as for `merge_part`.
        adapters: as for `merge_part`.
        out: as for `merge_part`.
        progress: called with (bytes compared, total bytes).
        push_progress: the same for the upload.

    Raises:
        UsageError: as for `merge`; another process is finishing this output.
        VerificationError: parts are missing or damaged; their names are among the problems.
        StorageError: a disk or file-system error; the parts are kept.
    """
    options = made_of(MergeAndPushOptions, keywords, "finish_merge")
    return with_push(in_parts.finish, (base, adapters, out), options, progress, push_progress, is_merge=True)


@keyword_options(MergeOptions)
def merge_status(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    **keywords: Unpack[WholePlanKeywords],
) -> PartsStatus:
    """How far a merge in parts is: what is done, what is missing, and who is at work. No weights are read.

    Args:
        base: as for `merge_part`.
        adapters: as for `merge_part`.
        out: as for `merge_part`.

    Raises:
        UsageError: another merge is at work on `out`.
        InputError, FitError: as for `merge`.
    """
    return in_parts.merge_status(base, adapters, out, made_of(MergeOptions, keywords, "merge_status"))
