"""`--part` and `--finish` of `verify`, `extract` and `inspect --values`: many workers, whose partial results are added up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.publish import with_push
from loratool.inspecting import in_parts as inspecting
from loratool.inspecting.options import InspectOptions
from loratool.options.described import keyword_options, made_of
from loratool.options.sharing import Share
from loratool.results.extract import ExtractReport
from loratool.results.facts import OneFacts
from loratool.results.partial import PartialReport
from loratool.results.verify import Verification
from loratool.reworking.extracting import in_parts as extracting
from loratool.reworking.extracting.options import ExtractOptions
from loratool.stores.names import is_in_store
from loratool.verifying import in_parts as verifying
from loratool.verifying.options import VerifyOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ExtractKeywords, InspectKeywords, VerifyKeywords


@keyword_options(VerifyOptions)
def verify_part(
    merged: PathLike,
    base: PathLike | None = None,
    adapters: Sequence[PathLike] | PathLike = (),
    *,
    part: str | Share,
    into: PathLike,
    progress: Progress | None = None,
    **keywords: Unpack[VerifyKeywords],
) -> PartialReport:
    """Do one worker's share of `verify`; what it finds goes into a folder that all workers share.

    Args:
        merged: as for `verify`.
        base: as for `verify`.
        adapters: as for `verify`.
        part: which worker this is, as for `merge_part`.
        into: the folder; it is made if it does not exist.
        progress: called with (units done, all units of this share).

    Raises:
        UsageError: the folder has results of something else; or as for `verify`.
        InputError, FitError, HubError: as for `verify`.
        StorageError: a disk or file-system error.
    """
    options = made_of(VerifyOptions, keywords, "verify_part")
    return verifying.verify_part(merged, base, adapters, options, Share.of(part), into, progress)


@keyword_options(VerifyOptions)
def finish_verify(
    merged: PathLike,
    base: PathLike | None = None,
    adapters: Sequence[PathLike] | PathLike = (),
    *,
    into: PathLike,
    progress: Progress | None = None,
    **keywords: Unpack[VerifyKeywords],
) -> Verification:
    """What `verify` returns, from the results of all workers. Tensors that differ are looked at again, to explain them.

    Args:
        merged: as for `verify_part`.
        base: as for `verify_part`.
        adapters: as for `verify_part`.
        into: the folder of the results.
        progress: called with (bytes done, total bytes) of tensors that are looked at again.

    Raises:
        VerificationError: results are missing or damaged.
        UsageError, InputError, FitError, HubError: as for `verify_part`.
    """
    options = made_of(VerifyOptions, keywords, "finish_verify")
    return verifying.finish_verify(merged, base, adapters, options, into, progress)


@keyword_options(ExtractOptions)
def extract_part(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    part: str | Share,
    into: PathLike,
    progress: Progress | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> PartialReport:
    """Do one worker's share of `extract`; the factors of its layers go into a folder that all workers share.

    Args:
        base: as for `extract`.
        tuned: as for `extract`.
        out: as for `extract`; it is written by `finish_extract` alone.
        part: which worker this is, as for `merge_part`.
        into: the folder; it is made if it does not exist.
        progress: called with (units done, all units of this share).

    Raises:
        UsageError: the folder has results of something else; or as for `extract`.
        InputError, FitError: as for `extract`.
        StorageError: a disk or file-system error.
    """
    options = made_of(ExtractOptions, keywords, "extract_part")
    if is_in_store(out):
        from loratool.publishing.storing import built_here

        with built_here(out, [base, tuned], options.overwrite) as (place, _):  # in which nothing is built yet
            return extracting.extract_part(base, tuned, place, options, Share.of(part), into, progress)
    return extracting.extract_part(base, tuned, out, options, Share.of(part), into, progress)


@keyword_options(ExtractOptions)
def finish_extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    into: PathLike,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> ExtractReport:
    """Write the adapter that `extract` writes, from the results of all workers.

    Args:
        base: as for `extract_part`.
        tuned: as for `extract_part`.
        out: as for `extract_part`.
        into: the folder of the results.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        VerificationError: results are missing or damaged.
        UsageError, InputError, FitError, StorageError, HubError: as for `extract`.
    """
    options = made_of(ExtractOptions, keywords, "finish_extract")
    return with_push(
        partial(extracting.finish_extract, into=into), (base, tuned, out), options, progress, push_progress
    )


@keyword_options(InspectOptions)
def inspect_part(
    path: PathLike,
    *,
    part: str | Share,
    into: PathLike,
    progress: Progress | None = None,
    **keywords: Unpack[InspectKeywords],
) -> PartialReport:
    """Do one worker's share of `inspect` with `values`; what it measures goes into a folder that all workers share.

    Args:
        path: an adapter.
        part: which worker this is, as for `merge_part`.
        into: the folder; it is made if it does not exist.
        progress: called with (units done, all units of this share).

    Raises:
        UsageError: the folder has results of something else, `values` is not asked for, or `path` is not an adapter.
        InputError, FitError: as for `inspect`.
        StorageError: a disk or file-system error.
    """
    options = made_of(InspectOptions, keywords, "inspect_part")
    return inspecting.inspect_part(path, options, Share.of(part), into, progress)


@keyword_options(InspectOptions)
def finish_inspect(
    path: PathLike,
    *,
    into: PathLike,
    **keywords: Unpack[InspectKeywords],
) -> OneFacts:
    """What `inspect` with `values` returns, from the results of all workers.

    Args:
        path: an adapter.
        into: the folder of the results.

    Raises:
        VerificationError: results are missing or damaged.
        UsageError, InputError, FitError: as for `inspect_part`.
    """
    return inspecting.finish_inspect(path, made_of(InspectOptions, keywords, "finish_inspect"), into)
