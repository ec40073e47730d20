"""`loratool inspect`: what is in adapters and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.inspecting import inspect as inspecting
from loratool.inspecting.inspect import InspectOptions
from loratool.options.described import keyword_options, made_of
from loratool.results.facts import Facts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import InspectKeywords
    from loratool.measuring.session import PathLike, Progress


@keyword_options(InspectOptions)
def inspect(path: PathLike, *, progress: Progress | None = None, **keywords: Unpack[InspectKeywords]) -> Facts:
    """Describe the adapter or checkpoint at `path`. Tensors are read only with `values` or `check`.

    With `check`, malformed inputs are reported as findings instead of raising. `loratool.measuring.modules` describes
    what `values` measures; with a `base`, also how much of each weight changes.

    Args:
        path: a folder, a `.safetensors` file, or the index of a checkpoint.
        progress: called with (modules measured, total modules).

    Raises:
        UsageError: both a base and a base config are given.
        InputError: neither an adapter nor a checkpoint, or a malformed one.
        FitError: the adapter does not fit the base.
    """
    return inspecting.inspect(path, made_of(InspectOptions, keywords, "inspect"), progress)
