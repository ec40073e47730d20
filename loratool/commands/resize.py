"""`loratool resize`: an adapter at other ranks, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function, operands_first
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.resize import ResizeReport
from loratool.reworking import resize as resizing
from loratool.reworking.resize import ResizeOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ResizeKeywords


@library_function(ResizeOptions)
def resize(
    adapter: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ResizeKeywords],
) -> ResizeReport:
    """Write a copy of the adapter with different ranks: each layer gets the best approximation at its new rank (Eckart
    and Young 1936).

    Pass one of `rank`, `energy`, `error`, `ratio`, `cumulative` and `budget`. Tensors other than the factors, such as saved modules,
    are copied. Alpha becomes the rank, so the scaling is 1; the singular values are split evenly between both factors.
    `layer_weights` is a mapping with patterns as in `rank_pattern`, or a JSON file of one. A `calibration` holds an (r,
    r) matrix for each module.

    Args:
        adapter: a folder, or a `.safetensors` file with its config in the same folder.
        out: the output folder.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: not exactly one rule is given, or a number is out of range.
        InputError: a malformed adapter, one that is not low-rank, or a calibration that does not fit it.
        FitError: every update is zero, or the factors overflow the dtype.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    with operands_first(adapter):
        options = made_of(ResizeOptions, keywords, "resize")
    return with_push(resizing.resize, (adapter, out), options, progress, push_progress)
