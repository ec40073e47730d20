"""`loratool compare`: how alike adapters are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.options.described import made_of
from loratool.results.compare import CompareReport
from loratool.reworking import compare as comparing
from loratool.reworking.compare import CompareOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import CompareKeywords


@library_function(CompareOptions)
def compare(
    adapters: Sequence[PathLike], *, progress: Progress | None = None, **keywords: Unpack[CompareKeywords]
) -> CompareReport:
    """Compare each pair of several adapters of one base, layer by layer and in total.

    Args:
        adapters: two or more folders, or `.safetensors` files with their config in the same folder.
        progress: called with (layers done, total layers).

    Raises:
        UsageError: fewer than two adapters.
        InputError: a malformed adapter, or one that is not low-rank.
        FitError: they have no layer in common, or a layer has different shapes.
    """
    return comparing.compare(adapters, made_of(CompareOptions, keywords, "compare"), progress)
