"""`loratool push`: a finished model or adapter goes to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.options.described import keyword_options, made_of
from loratool.publishing import pushing
from loratool.publishing.pushing import PushOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.commands.keywords import PushKeywords
    from loratool.measuring.session import PathLike, Progress
    from loratool.results.push import PushReport


@keyword_options(PushOptions)
def push(
    path: PathLike, repo: str, *, progress: Progress | None = None, **keywords: Unpack[PushKeywords]
) -> PushReport:
    """Upload a finished model or adapter to the Hub in one commit, and check what is there afterwards.

    A folder that loratool made is compared with its `loratool.json` first. Only what a model or an adapter is made of is
    sent, and of that only what the repository has not. The same call after an interruption continues with the files that
    have not arrived. The token is the one of `hf auth login` or HF_TOKEN.

    Args:
        path: the folder.
        repo: `org/name`, or `name` for the account of the token. It is made where it is missing.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: `path` is no folder, or what makes it a model is excluded.
        InputError: it is neither a model nor an adapter, is unfinished, or a file holds a secret.
        HubError: no token, no right, refused, or out of reach.
        VerificationError: the folder is not what loratool wrote, or what arrived is not what was sent.
    """
    return pushing.push(path, repo, made_of(PushOptions, keywords, "push"), progress)
