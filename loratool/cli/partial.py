"""`--part`, `--finish` and `--into` of commands whose partial results are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratool.errors import UsageError
from loratool.options.described import FLAG, Options, PathKind, option
from loratool.options.sharing import SHARE, Share


@dataclass(frozen=True, kw_only=True)
class PartialWords(Options):
    """Of a command that several workers may share; in the library, each way is a function of its own."""

    part: Share | None = option(  # noqa: RUF009 (it makes a field)
        help="Do the work of worker I of N, counted from 1, and keep the results in --into; auto takes both from "
        "SLURM_ARRAY_TASK_ID or RANK, auto/N takes I from JOB_COMPLETION_INDEX.",
        kind=SHARE,
        recorded=False,
    )
    finish: bool = option(
        help="Once all workers have ended: add their results up.", default=False, kind=FLAG, recorded=False
    )
    into: str | None = option(
        help="Folder, shared by all workers, for the results of --part.", kind=PathKind("FOLDER"), recorded=False
    )


def is_shared(words: PartialWords) -> bool:
    """Whether a command is to be done by several workers. Raises `UsageError` where its words contradict each other."""
    if words.part is not None and words.finish:
        raise UsageError("--part and --finish are mutually exclusive")
    asked = words.part is not None or words.finish
    if asked and words.into is None:
        raise UsageError(f"{'--part' if words.part is not None else '--finish'} needs --into FOLDER")
    if not asked and words.into is not None:
        raise UsageError("--into needs --part or --finish")
    return asked


def shared_work(command: str, words: PartialWords, given: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of the library that does a worker's share of a command, or that adds up what all of them found.

    Raises `UsageError` where a share is to be pushed.
    """
    from loratool.commands import partial as shares

    if words.part is None:
        return partial(getattr(shares, f"finish_{command}"), into=words.into)
    if given.get("push_to_hub") is not None:
        raise UsageError("--part and --push-to-hub are mutually exclusive; pass --push-to-hub with --finish")
    return partial(getattr(shares, f"{command}_part"), part=words.part, into=words.into)
