"""`--part`, `--finish` and `--into` of commands whose partial results are added up."""

from __future__ import annotations

from dataclasses import dataclass

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
