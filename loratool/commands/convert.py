"""`loratool convert`: an adapter in another dialect, then a push where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.commands.publish import with_push
from loratool.options.described import made_of
from loratool.results.convert import ConvertReport
from loratool.reworking.converting import convert as converting
from loratool.reworking.converting.convert import ConvertOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import ConvertKeywords


@library_function(ConvertOptions)
def convert(
    adapter: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
    push_progress: Progress | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> ConvertReport:
    """Write the same adapter as another tool spells it, and prove it.

    Before it is published, the output is read back, and ΔW of every layer is compared with that of the input in float64.
    What the dialect cannot express is baked in where that is exact, and else refused.

    Args:
        adapter: a folder or a file.
        out: the output folder; for dialects of one file also that file.
        progress: called with (layers done, total layers).
        push_progress: called with (bytes done, total bytes) of the upload.

    Raises:
        UsageError: no dialect is given, or OUT exists.
        InputError: a malformed adapter.
        FitError: the dialect cannot express the adapter, or the factors overflow the dtype.
        StorageError: a disk or file-system error.
        HubError: the output is complete, but the Hub refused the push.
    """
    options = made_of(ConvertOptions, keywords, "convert")
    return with_push(converting.convert, (adapter, out), options, progress, push_progress)
