"""`loratool push`: a finished model or adapter goes to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.commands.library import library_function
from loratool.options.described import made_of
from loratool.publishing import pushing
from loratool.publishing.options import PushOptions
from loratool.results.push import PushReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratool.arguments import PathLike, Progress
    from loratool.commands.keywords import PushKeywords


@library_function(PushOptions)
def push(
    path: PathLike, repo: str, *, progress: Progress | None = None, **keywords: Unpack[PushKeywords]
) -> PushReport:
    """Upload a finished model or adapter to the Hub in one commit, then verify the uploaded files.

    A folder that loratool made is first checked against its `loratool.json`. Only the files of the model or adapter are
    uploaded, and only those that the repository lacks. After an interruption, the same call uploads the remaining
    files. The token comes from `hf auth login` or HF_TOKEN.

    Args:
        path: the folder, or a prefix in a store, `s3://bucket/prefix`, from which weights are sent as they are read.
        repo: `org/name`, or `name` for the account of the token. It is created if missing.
        progress: called with (bytes done, total bytes).

    Raises:
        UsageError: a file that the model needs is excluded.
        InputError: `path` is not a folder, is neither a model nor an adapter, is unfinished, or a file holds a secret.
        HubError: there is no token, or the Hub is unreachable or refused the upload.
        VerificationError: the folder differs from what loratool wrote, or the uploaded files from the local ones.
    """
    return pushing.push(path, repo, made_of(PushOptions, keywords, "push"), progress)
