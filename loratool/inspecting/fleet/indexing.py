"""`index()`: the sketches of many adapters, in one file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.arguments import PathLike, Progress
from loratool.errors import FitError, InputError
from loratool.files.names import at_home
from loratool.inspecting.fleet.table import Fleet
from loratool.inspecting.neighbours import Entry, check_index, write_index
from loratool.inspecting.options import InspectOptions
from loratool.notes import Note
from loratool.options.described import FLAG, Options, PlaceKind, option
from loratool.results.base import Cost
from loratool.results.findings import worst
from loratool.results.index import IndexReport

BASE_UNUSED = Note(
    "base-not-used", "--base makes no difference: the adapters fit it, and their sketches are the same without it"
)


@dataclass(frozen=True, kw_only=True)
class IndexOptions(Options):
    """Of `index`."""

    base: str | None = option(
        help="Base model of the adapters, for names and rows that they do not record.",
        kind=PlaceKind(),
    )
    overwrite: bool = option(
        help="Replace INDEX if it was written by loratool index.", default=False, kind=FLAG, recorded=False
    )


def index(
    paths: Sequence[PathLike], out: PathLike, options: IndexOptions, progress: Progress | None = None
) -> IndexReport:
    """Sketch every adapter that some paths mean; `loratool.commands.index` says all of it."""
    started = time.monotonic()
    target = at_home(out)
    check_index(target, options.overwrite)
    fleet = Fleet(paths, InspectOptions(values=True, base=options.base))
    rows = list(fleet.rows(progress))
    entries, failed = [], {}
    for row in rows:
        if row.sketched is None:
            failed[row.name] = row.reason
            continue
        told = row.sketched
        entries.append(Entry(row.name, row.path, row.base, told.names, told.norm, told.rounding, told.saved))
    if not entries:
        raise InputError("none of these adapters can be sketched:", (f"{name}: {why}" for name, why in failed.items()))
    write_index(target, entries, [fleet.sketches[entry.name].values for entry in entries])
    fits = all(row.exit_code != FitError.exit_code for row in rows)
    return IndexReport(
        out=target,
        adapters=tuple(entry.name for entry in entries),
        bytes=target.stat().st_size,
        failed=failed,
        left_out=tuple(fleet.left_out),
        notes=(BASE_UNUSED,) if options.base is not None and fits and not fleet.needs_base else (),
        exit_code=worst(row.exit_code for row in rows),
        cost=Cost.since(started, "cpu"),
    )
