"""`loratool index`: sketches of many adapters in one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import several
from loratool.commands.library import library_function
from loratool.inspecting.fleet import indexing
from loratool.inspecting.fleet.indexing import IndexOptions
from loratool.options.described import made_of
from loratool.results.index import IndexReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike, Progress
    from loratool.commands.keywords import IndexKeywords


@library_function(IndexOptions)
def index(
    paths: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[IndexKeywords],
) -> IndexReport:
    """Keep a sketch of every adapter in one file, in which `inspect` with `near` finds the nearest to another adapter.

    An adapter that cannot be read or sketched is left out; the report says why.

    Args:
        paths: a folder of adapters, an adapter, a pattern with wildcards, or a list of these.
        out: the file to write.
        progress: called with (adapters read, all adapters).

    Raises:
        UsageError: the file exists, and may not be replaced.
        InputError: no adapter was found, or none that can be sketched.
    """
    return indexing.index(several(paths), out, made_of(IndexOptions, keywords, "index"), progress)
