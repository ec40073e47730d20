"""`--push-to-hub` of the commands that write: their output goes to the Hub as `loratool push` sends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from loratool.errors import LoratoolError, printable
from loratool.options.writing import PublishOptions
from loratool.publishing.options import PushOptions
from loratool.stores.names import is_in_store

if TYPE_CHECKING:
    from loratool.arguments import Progress
    from loratool.results.base import Written


Report = TypeVar("Report", bound="Written")


def with_push(
    make: Callable[..., Report],
    operands: Sequence[Any],
    options: PublishOptions,
    progress: Progress | None,
    push_progress: Progress | None,
    is_merge: bool = False,
) -> Report:
    """The report of `make(*operands, options, progress)`, whose output is pushed where that is asked for.

    The last operand is OUT. Where that is in a store, it is made here and then put there, but for merges, which know
    stores. These make models, which are not pushed next to an adapter.
    """
    if options.destination is not None:  # that a push is possible is found out before the work for it is done
        from loratool.publishing.committing import full_name

        repo = full_name(options.destination)
        if is_merge:
            from loratool.publishing.pushing import check_no_adapter

            check_no_adapter(repo)
    if is_merge or not is_in_store(operands[-1]):
        report = make(*operands, options, progress)
    else:
        from loratool.publishing.storing import made_in_store

        report = made_in_store(make, operands, options, progress)
    return published(report, options, push_progress)


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
        raise type(error)(
            f"{error.message} ({again})", error.problems, f"loratool push {out} {printable(repo)}"
        ) from None
    except KeyboardInterrupt as error:
        error.args = (again,)
        raise
    return dataclasses.replace(report, pushed=pushed)
