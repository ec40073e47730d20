"""`--push-to-hub` of the commands that write: their output goes to the Hub as `loratool push` sends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.errors import LoratoolError, UsageError, printable
from loratool.options.described import option
from loratool.options.shared import WritingOptions
from loratool.publishing.options import PushOptions, SendOptions

if TYPE_CHECKING:
    from loratool.measuring.session import Progress
    from loratool.results.base import Written


Report = TypeVar("Report", bound="Written")


@dataclass(frozen=True, kw_only=True)
class PublishOptions(SendOptions):
    """Of a command that writes an output."""

    push_to_hub: str | None = option(
        help="Also upload the output, as `loratool push` does.", metavar="REPO", recorded=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is None and (idle := [flag for flag, given in self.for_push().items() if given]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise UsageError(f"{flags} needs --push-to-hub REPO")

    def for_push(self) -> dict[str, Any]:
        """The options that are those of `push`."""
        return {"public": self.public, "allow_secret": self.allow_secret}

    @property
    def destination(self) -> str | None:
        """The repository that the output goes to; none where there is no output, or it stays here."""
        dry = isinstance(self, WritingOptions) and self.dry_run
        return None if dry else self.push_to_hub


def with_push(
    make: Callable[..., Report],
    operands: Sequence[Any],
    options: PublishOptions,
    progress: Progress | None,
    push_progress: Progress | None,
) -> Report:
    """The report of `make(*operands, options, progress)`, whose output is pushed where that is asked for."""
    if options.destination is not None:  # that a push is possible is found out before the work for it is done
        from loratool.publishing.committing import full_name

        full_name(options.destination)
    return published(make(*operands, options, progress), options, push_progress)


def published(report: Report, options: PublishOptions, progress: Progress | None) -> Report:
    """The report of a command, after its output was pushed where that is asked for."""
    repo = options.destination
    if repo is None:
        return report
    from loratool.publishing.pushing import push

    out = printable(report.out)  # type: ignore[attr-defined]
    again = f"{out} is complete; to continue, run `loratool push {out} {printable(repo)}`"
    try:
        pushed = push(report.out, repo, PushOptions(**options.for_push()), progress)  # type: ignore[attr-defined]
    except LoratoolError as error:
        raise type(error)(f"{error.message} ({again})", error.problems) from None
    except KeyboardInterrupt as error:
        error.args = (again,)
        raise
    return dataclasses.replace(report, pushed=pushed)
