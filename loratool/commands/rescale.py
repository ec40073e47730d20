"""`loratool rescale`: an adapter at another strength, then a push where one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.commands.publish import PublishOptions, with_push
from loratool.options.described import keyword_options, made_of
from loratool.reworking import rescale as rescaling
from loratool.reworking.rescale import RescaleOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import RescaleKeywords
    from loratool.measuring.session import PathLike, Progress
    from loratool.results.rescale import RescaleReport


@dataclass(frozen=True, kw_only=True)
class RescaleAndPushOptions(RescaleOptions, PublishOptions):
    """Of `rescale`."""


@keyword_options(RescaleAndPushOptions)
def rescale(
    adapter: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[RescaleKeywords],
) -> RescaleReport:
    """Write the adapter at another strength.

    Without `bake` no tensor changes: α is multiplied, and α patterns with it. At most one of `scale`, `alpha`,
    `frobenius` and `spectral` is given; `match` multiplies what they make of a module: a mapping, or `REGEX=FACTOR` each.
    A pattern is looked for anywhere in a module's name, and the first that is found counts.

    Args:
        adapter: a folder, or a `.safetensors` file with its config beside it.
        out: the folder to make.
        progress: called with (layers done, layers in all).
        push_progress: called with (bytes done, bytes in all) of the upload.

    Raises:
        UsageError: nothing is asked for, too much, or a number out of range.
        InputError: a malformed adapter, or one without a scale.
        FitError: a norm is asked for and an update is zero, or the dtype cannot hold the factors.
        StorageError: the disk or the file system said no.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(RescaleAndPushOptions, keywords, "rescale")
    return with_push(rescaling.rescale, (adapter, out), options, progress, push_progress)
