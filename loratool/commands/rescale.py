"""`loratool rescale`: an adapter at another strength, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.rescale import RescaleReport
from loratool.reworking import rescale as rescaling
from loratool.reworking.rescale import RescaleOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import RescaleKeywords


@library_function(RescaleOptions)
def rescale(
    adapter: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[RescaleKeywords],
) -> RescaleReport:
    """Write a copy of the adapter with a different scaling.

    Without `bake` no tensor changes: only alpha and alpha_pattern are multiplied. Pass at most one of `scale`, `alpha`,
    `frobenius` and `spectral`; `match` multiplies their result for each module by a factor: a mapping, or a
    `REGEX=FACTOR` each. A pattern may match anywhere in a module's name, and the first match counts.

    Args:
        adapter: a folder, or a `.safetensors` file with its config in the same folder.
        out: the output folder.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: no change or conflicting changes are requested, or a number is out of range.
        InputError: a malformed adapter, or one without a scale.
        FitError: a norm is requested but an update is zero, or the factors overflow the dtype.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(RescaleOptions, keywords, "rescale")
    return with_push(rescaling.rescale, (adapter, out), options, progress, push_progress)
