"""`push()`: select → compare → upload → commit → check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratool import record
from loratool.checkpoint import INDEX_SUFFIX
from loratool.hub.committing import REMOTE_JOURNAL, Commit, check_name, commit, differing, files_of, open_repo
from loratool.hub.selecting import Selection, check_message, select
from loratool.results import Result

if TYPE_CHECKING:
    from loratool.merging import PathLike
    from loratool.notes import Note


@dataclass(frozen=True)
class PushReport(Result):
    """What a push did. Sizes are bytes, times seconds."""

    repo: str
    kind: str  # model or adapter
    url: str  # of the commit, or of the repository where nothing was sent
    commit: str
    pull_request: str
    private: bool
    files: dict[str, int]  # all that is to be there → size
    uploaded: tuple[str, ...]
    replaced: tuple[str, ...]  # weights of an earlier model that were deleted in the same commit
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        from loratool.report.hub import push_text

        return push_text(self)


def push(
    path: PathLike,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_secret: Sequence[str] = (),
    card: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PushReport:
    """Upload a finished model or adapter to the Hub in one commit, and check what is there afterwards.

    A folder that loratool made is compared with its `loratool.json` first. Only what a model or an adapter is made of is
    sent, and of that only what the repository has not. The same call after an interruption continues with the files that
    have not arrived. The token is the one of `hf auth login` or HF_TOKEN.

    Args:
        path: the folder.
        repo: `org/name`, or `name` for the account of the token. It is made where it is missing.
        public: make a new repository public; an existing one stays as it is.
        revision: the branch to commit to, made from main where it is missing; main by default.
        create_pr: propose the commit as a pull request.
        message: of the commit.
        include: patterns of more files, as in `fnmatch`.
        exclude: patterns of files to leave out.
        allow_secret: patterns of files that hold no secret although it looks so.
        card: send a README.md made from `loratool.json` though there is one.
        dry_run: report what would be sent and ask nobody.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: `path` is no folder, or what makes it a model is excluded.
        InputError: it is neither a model nor an adapter, is unfinished, or a file holds a secret.
        HubError: no token, no right, refused, or out of reach.
        VerificationError: the folder is not what loratool wrote, or what arrived is not what was sent.
    """
    started = time.monotonic()
    check_message(message)
    check_name(repo)
    unlike = record.check(Path(path))
    choice = partial(select, Path(path), list(include), list(exclude), card, allow_secret=list(allow_secret))
    selection = choice(place=repo)
    notes = [*selection.notes, *unlike]
    sizes = {upload.name: upload.size for upload in selection.uploads}
    if dry_run:
        return report(repo, selection, Commit("", ""), not public, tuple(sizes), (), notes, started, dry_run)
    named = repo
    repo, private = open_repo(repo, public, revision, notes)
    if repo != named:
        selection = choice(place=repo)  # for the card's code names it
    there = files_of(repo, revision)
    uploads = differing(selection.uploads, there)
    replaced = outdated(selection, set(there))
    done = Commit("", "")
    if uploads or replaced:
        total, sent = sum(upload.size for upload in uploads), 0

        def tell(count: int) -> None:
            nonlocal sent
            sent += count
            if progress:
                progress(sent, total)

        done = commit(
            repo,
            revision,
            uploads,
            message or f"Upload {selection.kind} with loratool",
            delete=replaced,
            create_pr=create_pr,
            tell=tell,
        )
    return report(
        repo, selection, done, private, tuple(u.name for u in uploads), tuple(replaced), notes, started, dry_run
    )


def outdated(selection: Selection, there: set[str]) -> list[str]:
    """Weights of another model at the top of the repository, which loaders would take for this one's.

    A journal of a streaming merge goes too, for that merge would go on over this model.
    """
    if selection.kind != "model":
        return []
    names = {upload.name for upload in selection.uploads}
    return sorted(
        name
        for name in there - names
        if ("/" not in name and name.endswith((".safetensors", INDEX_SUFFIX)) and not name.startswith("adapter_"))
        or name == REMOTE_JOURNAL
    )


def report(
    repo: str,
    selection: Selection,
    done: Commit,
    private: bool,
    uploaded: tuple[str, ...],
    replaced: tuple[str, ...],
    notes: Sequence[Note],
    started: float,
    dry_run: bool,
) -> PushReport:
    from loratool.fetching.client import endpoint

    return PushReport(
        repo=repo,
        kind=selection.kind,
        url=done.url or f"{endpoint()}/{repo}",
        commit=done.oid,
        pull_request=done.pull_request,
        private=private,
        files={upload.name: upload.size for upload in selection.uploads},
        uploaded=uploaded,
        replaced=replaced,
        left_out=selection.left_out,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
        dry_run=dry_run,
    )
