"""`loratool combine`: several adapters into one, then a push where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function, operands_first
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.combine import CombineReport
from loratool.reworking import combine as combining
from loratool.reworking.combine_options import CombineOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import CombineKeywords


@library_function(CombineOptions)
def combine(
    adapters: Sequence[PathLike] | PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[CombineKeywords],
) -> CombineReport:
    """Combine several adapters of one base into one.

    A layer that some adapters lack is combined from those that have it. Biases of lora_B are summed with the weights;
    saved modules and token rows are kept if all adapters agree on them. The result is plain LoRA with alpha = rank. A
    weight is a number, or a mapping of numbers by pattern with "default" for the rest. `method` is a key of
    `loratool.algebra.methods.table.METHODS`.

    Args:
        adapters: folders, or `.safetensors` files with their config in the same folder.
        out: the output folder.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: options are out of range or do not apply to the method.
        InputError: a malformed adapter, or one that is not low-rank.
        FitError: the adapters have different bases or saved values, use DoRA, or are all zero.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    with operands_first(adapters):
        options = made_of(CombineOptions, keywords, "combine")
    return with_push(combining.combine, (adapters, out), options, progress, push_progress)
