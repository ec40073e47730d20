"""`loratool inspect`: what is in adapters and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import several
from loratool.commands.library import library_function
from loratool.errors import UsageError
from loratool.inspecting import inspect as inspecting
from loratool.inspecting.options import InspectOptions
from loratool.options.described import made_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike, Progress
    from loratool.commands.keywords import InspectKeywords
    from loratool.results.facts import OneFacts
    from loratool.results.fleet import FleetFacts


@library_function(InspectOptions)
def inspect(
    path: PathLike | Sequence[PathLike], *, progress: Progress | None = None, **keywords: Unpack[InspectKeywords]
) -> OneFacts | FleetFacts:
    """Describe the adapter or checkpoint at `path`. Tensors are read only with `values` or `check`.

    With `check`, malformed inputs are reported as findings instead of raising. `loratool.measuring.modules` describes
    what `values` measures; with a `base`, also how much of each weight changes.

    A folder of adapters, a pattern with wildcards, or a list of paths gives a table with a row for each adapter
    (`FleetFacts`). One that cannot be read is a row with its reason.

    Args:
        path: a folder, a `.safetensors` file, the index of a checkpoint, or what a table is made of.
        progress: called with (modules measured, total modules), or of a table (adapters read, all adapters).

    Raises:
        UsageError: both a base and a base config are given, or conditions are not understood.
        InputError: neither an adapter nor a checkpoint, or a malformed one.
        FitError: the adapter does not fit the base.
    """
    options = made_of(InspectOptions, keywords, "inspect")
    if not isinstance(path, os.PathLike) and not path:
        raise UsageError("inspect needs at least one path")
    if isinstance(path, (str, os.PathLike)) and not is_table([path], options):
        return inspecting.inspect(path, options, progress)
    from loratool.inspecting.fleet.table import table_of

    return table_of(several(path), options, progress)


def is_table(paths: Sequence[PathLike], options: InspectOptions) -> bool:
    """Whether paths are shown as a table: any means several adapters, or options of a table are given."""
    if options.where is not None or options.sort is not None:
        return True
    if options.adapter_name:  # of several adapters in one folder
        return False
    from loratool.inspecting.fleet.members import is_table as several

    return several(paths)
