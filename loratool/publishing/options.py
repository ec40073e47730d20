"""The options of `push`, and those of other commands whose output is pushed."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.options.described import FLAG, option
from loratool.options.writing import SendOptions


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
        help="Upload a card generated from loratool.json, even if PATH has a README.md.",
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
