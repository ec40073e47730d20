"""`loratool extract`: an adapter out of a full fine-tune, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.extract import ExtractReport
from loratool.reworking.extracting import extract as extracting
from loratool.reworking.extracting.options import ExtractOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ExtractKeywords


@library_function(ExtractOptions)
def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ExtractKeywords],
) -> ExtractReport:
    """Extract an adapter from a fine-tuned model: a low-rank approximation of `tuned` − `base`.

    Each difference M = W_tuned − W_base is approximated by the best ΔW = BA of its rank (Eckart and Young 1936), using
    a randomised sketch that reads M row by row. Tensors that are not matrices, or whose shape changed, are saved whole.
    The rank "auto" keeps the singular values that rounding to the storage dtype cannot explain, up to `max_rank`.

    Args:
        base: the model before fine-tuning, a folder or a file.
        tuned: the model after fine-tuning; it may be sharded differently and have other dtypes.
        out: the output folder.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: a number is out of range, or a pattern is invalid or matches nothing.
        InputError: a malformed checkpoint, an adapter, or values that are NaN or infinite.
        FitError: the models have nothing in common or are identical, the orientation of a matrix is unknown, or the
            factors overflow the dtype.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(ExtractOptions, keywords, "extract")
    return with_push(extracting.extract, (base, tuned, out), options, progress, push_progress)
