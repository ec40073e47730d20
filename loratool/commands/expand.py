"""`loratool expand`: one adapter out of compressed ones, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.compress import ExpandReport
from loratool.reworking.compressing import expand as expanding
from loratool.reworking.compressing.options import ExpandOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ExpandKeywords


@library_function(ExpandOptions)
def expand(
    shared: PathLike,
    name: str,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ExpandKeywords],
) -> ExpandReport:
    """Write one of the adapters that `compress` put into a folder as a plain adapter, in the dialect it came from.

    Args:
        shared: the folder that `compress` made.
        name: the adapter, which is the name of its file without `.safetensors`.
        out: the output folder.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: the folder has no such adapter.
        InputError: a folder that `compress` did not make, or a file of another one.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(ExpandOptions, keywords, "expand")
    return with_push(expanding.expand, (shared, name, out), options, progress, push_progress)
