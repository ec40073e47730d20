"""`loratool merge --stream`: a merge that streams to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.arguments import PathLike, Progress
from loratool.commands.library import library_function
from loratool.options.described import made_of
from loratool.publishing import streaming
from loratool.publishing.streaming import StreamOptions
from loratool.results.stream import StreamReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import StreamKeywords


@library_function(StreamOptions, "merge")
def stream(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    repo: str,
    *,
    progress: Progress | None = None,
    **keywords: Unpack[StreamKeywords],
) -> StreamReport:
    """Merge as `merge` does, and upload each output file before the next is made.

    At most two weight files are on this disk at a time, in a folder of the working directory that goes when all is
    done. The same call after an interruption continues with the files that the repository has not.

    Args:
        base: a model on the Hub, or a local one; "auto" for the one that the adapters name.
        adapters: one adapter or several.
        repo: `org/name` of the repository to make, or `name` for the account of the token.
        progress: called with (bytes done, total bytes).

    Raises:
        UsageError: the arguments contradict each other, or the repository holds a model.
        InputError, FitError: as for `merge`.
        StorageError: there is no room for two files.
        HubError: no token, no right, missing, gated or out of reach.
        VerificationError: what arrived is not what was sent.
    """
    return streaming.stream(base, adapters, repo, made_of(StreamOptions, keywords, "stream"), progress)
