"""`push()`: select → compare → upload → commit → check."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapters.formats.known import PEFT_CONFIG
from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, UsageError, printable
from loratool.fetching.client import api, asking, endpoint, patiently
from loratool.fetching.stores import brought
from loratool.files.folders import MODEL_INDEX, REMOTE_JOURNAL
from loratool.files.pipelines import is_index
from loratool.notes import Note
from loratool.provenance import record
from loratool.publishing.committing import Commit, check_name, commit, differing, files_of, open_repo
from loratool.publishing.illustrating import picture_of
from loratool.publishing.selecting import Selection, check_message, select
from loratool.results.base import Cost
from loratool.results.push import PushReport
from loratool.stores.names import is_in_store, parse_store

if TYPE_CHECKING:
    from loratool.publishing.options import PushOptions


def push(path: PathLike, repo: str, options: PushOptions, progress: Progress | None = None) -> PushReport:
    """Upload a finished model or adapter in one commit; `loratool.commands.push` says all of it."""
    started = time.monotonic()
    check_message(options.message)
    check_name(repo)
    root = folder_at(path, options.include)
    unlike = record.check(root)
    choice = partial(
        select,
        root,
        list(options.include),
        list(options.exclude),
        options.card,
        allow_secret=list(options.allow_secret),
        picture=cache(partial(picture_of, root)),
    )
    selection = choice(place=repo)
    notes = [*selection.notes, *unlike]
    planned = expected(repo, selection, options, notes, started)
    if options.dry_run:
        return planned
    repo, private = open_repo(repo, options.public, options.revision, notes)
    if repo != planned.repo:
        selection = choice(place=repo)  # for the card's code names it
    there = files_of(repo, options.revision)
    notes += check_alone(repo, selection, there)
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
    return replace(
        planned,
        repo=repo,
        url=done.url or f"{endpoint()}/{repo}",
        commit=done.oid,
        pull_request=done.pull_request,
        private=private,
        files={upload.name: upload.size for upload in selection.uploads},
        uploaded=tuple(upload.name for upload in uploads),
        replaced=tuple(replaced),
        left_out=selection.left_out,
        notes=tuple(notes),
        cost=Cost.since(started),
    )


def expected(
    repo: str, selection: Selection, options: PushOptions, notes: Sequence[Note], started: float
) -> PushReport:
    """What a push would do to an empty repository."""
    sizes = {upload.name: upload.size for upload in selection.uploads}
    return PushReport(
        repo=repo,
        kind=selection.kind,
        url=f"{endpoint()}/{repo}",
        commit="",
        pull_request="",
        private=not options.public,
        files=sizes,
        uploaded=tuple(sizes),
        replaced=(),
        left_out=selection.left_out,
        notes=tuple(notes),
        cost=Cost.since(started),
        dry_run=options.dry_run,
    )


def folder_at(path: PathLike, include: Sequence[str]) -> Path:
    """The folder that is pushed; of a prefix in a store one in which weights stand for their objects."""
    place = parse_store(path) if is_in_store(path) else None
    if place is None:
        return Path(path)
    found = brought(place, "any", [each for pattern in include for each in (pattern, f"*/{pattern}")])
    if found.is_file():
        raise InputError(f"{place}: a repository holds a folder; push the prefix that the object is in")
    return found


def check_alone(repo: str, selection: Selection, there: Collection[str]) -> Iterator[Note]:
    """What to know where a model and an adapter would be in one repository: loaders put the adapter on the model.

    Raises `UsageError` for a model next to an adapter: a merged one would be changed by it once more.
    """
    sent = {upload.name for upload in selection.uploads}
    if selection.kind == "model" and PEFT_CONFIG in there and PEFT_CONFIG not in sent:
        raise next_to_adapter(repo)
    weights = [name for name in set(there) - sent if name.endswith(".safetensors") and not folder_of(name)]
    if selection.kind == "adapter" and PEFT_CONFIG in sent and weights and "config.json" in there:
        yield Note("model-in-repo", f"{repo} also contains a model; transformers would load this adapter on top of it")


def check_no_adapter(repo: str) -> None:
    """Raise `UsageError` for a repository with an adapter, before a model is made for it."""
    with asking(repo):
        found = patiently(lambda: api().file_exists(repo, PEFT_CONFIG))
    if found:
        raise next_to_adapter(repo)


def next_to_adapter(repo: str) -> UsageError:
    return UsageError(
        f"{printable(repo)} contains an adapter ({PEFT_CONFIG}), which transformers would load on top of the model; push "
        "the model to another repository, or delete the adapter's files from this one"
    )


def outdated(selection: Selection, there: set[str]) -> list[str]:
    """Weights of another model at the top of the repository or beside ours, which loaders would take for this one's.

    A journal of a streaming merge goes too, for that merge would go on over this model.
    """
    if selection.kind != "model":
        return []
    names = {upload.name for upload in selection.uploads}
    folders = {"", *(folder_of(name) for name in names if name.endswith(".safetensors"))}

    def is_stale(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        weights = file.endswith(".safetensors") or is_index(file)
        return name in (REMOTE_JOURNAL, MODEL_INDEX) or (
            folder in folders and weights and not file.startswith("adapter_")
        )

    return sorted(filter(is_stale, there - names))


def folder_of(name: str) -> str:
    """The folder of a file in a repository; nothing at its top."""
    return name.rpartition("/")[0]
