"""`push()`: select → compare → upload → commit → check."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.files.checkpoint import INDEX_SUFFIX
from loratool.files.process import peak_memory
from loratool.options.described import FLAG, Options, option
from loratool.provenance import record
from loratool.publishing.committing import REMOTE_JOURNAL, Commit, check_name, commit, differing, files_of, open_repo
from loratool.publishing.selecting import Selection, check_message, select
from loratool.results.base import Cost
from loratool.results.push import PushReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loratool.merging.merge import PathLike
    from loratool.notes import Note


@dataclass(frozen=True, kw_only=True)
class SendOptions(Options):
    """Of whatever sends files to the Hub."""

    public: bool = option(help="Make a newly created repository public.", default=False, kind=FLAG, recorded=False)
    allow_secret: tuple[str, ...] = option(
        help="Upload FILE (or files matching a pattern) although it seems to contain a secret; may be repeated.",
        default=(),
        many=True,
        metavar="FILE",
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class CommitOptions(SendOptions):
    """Of whatever makes a commit that is told how."""

    exclude: tuple[str, ...] = option(
        help="Do not upload these files; may be repeated.",
        default=(),
        many=True,
        metavar="PATTERN",
        recorded=False,
    )

    revision: str | None = option(
        help="Branch to commit to, created if missing [default: main].", metavar="BRANCH", recorded=False
    )
    message: str | None = option("-m", "--message", help="Commit message.", recorded=False)
    card: bool = option(
        help="Upload a README.md made from loratool.json even if there is one.",
        default=False,
        kind=FLAG,
        recorded=False,
    )
    dry_run: bool = option(
        help="Print what would be uploaded and what is left out, without using the network.",
        default=False,
        kind=FLAG,
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class PushOptions(CommitOptions):
    """Of `push`."""

    create_pr: bool = option(help="Propose the commit as a pull request.", default=False, kind=FLAG, recorded=False)
    include: tuple[str, ...] = option(
        help="Also upload these files; may be repeated.", default=(), many=True, metavar="PATTERN", recorded=False
    )


def push(
    path: PathLike, repo: str, options: PushOptions, progress: Callable[[int, int], None] | None = None
) -> PushReport:
    """Upload a finished model or adapter in one commit; `loratool.commands.push` says all of it."""
    started = time.monotonic()
    check_message(options.message)
    check_name(repo)
    unlike = record.check(Path(path))
    choice = partial(
        select,
        Path(path),
        list(options.include),
        list(options.exclude),
        options.card,
        allow_secret=list(options.allow_secret),
    )
    selection = choice(place=repo)
    notes = [*selection.notes, *unlike]
    sizes = {upload.name: upload.size for upload in selection.uploads}
    if options.dry_run:
        planned = report(repo, selection, Commit("", ""), not options.public, tuple(sizes), (), notes, started)
        return replace(planned, dry_run=True)
    named = repo
    repo, private = open_repo(repo, options.public, options.revision, notes)
    if repo != named:
        selection = choice(place=repo)  # for the card's code names it
    there = files_of(repo, options.revision)
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
            options.revision,
            uploads,
            options.message or f"Upload {selection.kind} with loratool",
            delete=replaced,
            create_pr=options.create_pr,
            tell=tell,
        )
    sent_names = tuple(upload.name for upload in uploads)
    return report(repo, selection, done, private, sent_names, tuple(replaced), notes, started)


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
) -> PushReport:
    """What is told of a push."""
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
        cost=Cost(seconds=time.monotonic() - started, peak_memory=peak_memory()),
        dry_run=False,
    )
