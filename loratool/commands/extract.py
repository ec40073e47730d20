"""`loratool extract`: an adapter out of a full fine-tune, then a push where one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.commands.publish import PublishOptions, with_push
from loratool.options.described import keyword_options, made_of
from loratool.reworking.extracting import extract as extracting
from loratool.reworking.extracting.options import ExtractOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ExtractKeywords
    from loratool.measuring.session import PathLike, Progress
    from loratool.results.extract import ExtractReport


@dataclass(frozen=True, kw_only=True)
class ExtractAndPushOptions(ExtractOptions, PublishOptions):
    """Of `extract`."""


@keyword_options(ExtractAndPushOptions)
def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> ExtractReport:
    """Write the adapter that makes `tuned` of `base`, as nearly as its ranks allow.

    Every weight's difference M = W_tuned − W_base gets the nearest ΔW = BA of its rank (Eckart and Young 1936), by a
    randomised sketch that takes M row by row. What is no matrix, or changed its shape, is saved whole. The rank "auto"
    keeps the singular values that rounding to the storage dtype cannot have made, up to `max_rank`.

    Args:
        base: the model before, a folder or a file.
        tuned: the model after; its files and dtypes may be others.
        out: the folder to make.
        progress: called with (layers done, layers in all).
        push_progress: called with (bytes done, bytes in all) of the upload.

    Raises:
        UsageError: a number out of range, a pattern that is none or matches nothing.
        InputError: a malformed checkpoint, an adapter, or values that are NaN or infinite.
        FitError: nothing in common, nothing differs, nothing tells how a matrix is stored, or the dtype cannot hold
            the factors.
        StorageError: the disk or the file system said no.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(ExtractAndPushOptions, keywords, "extract")
    return with_push(extracting.extract, (base, tuned, out), options, progress, push_progress)
