"""`record()`: the bill of materials of an output."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loratool.arguments import PathLike
from loratool.lineage.bill import Part, bill_of
from loratool.lineage.documents import FORMATS, document
from loratool.lineage.locating import here
from loratool.notes import Note, as_records
from loratool.options.described import Choice, Options, option
from loratool.results.base import Cost
from loratool.results.record import Record
from loratool.templates import some


@dataclass(frozen=True, kw_only=True)
class RecordOptions(Options):
    """Of `record`."""

    format: str = option(
        help="spdx is SPDX 3.0 with the AI profile, cyclonedx an ML-BOM of CycloneDX 1.6, json loratool's own.",
        default="json",
        kind=Choice(lambda: FORMATS),
    )


def record(out: PathLike, options: RecordOptions) -> Record:
    """The bill of an output; `loratool.commands.record` says all of it."""
    started = time.monotonic()
    bill = bill_of(here(Path(out)))
    notes = tuple(remarks(bill))
    written = document(bill, options.format)
    own = {"notes": as_records(notes)} if options.format == "json" else {}
    return Record(options.format, {**written, **own}, notes, cost=Cost.since(started))


def remarks(bill: Part) -> Iterator[Note]:
    """What a reader of the bill should know."""
    missing = [f"{p.name}/{f.name}" for p in bill.all for f in p.files if not f.sha256 and not f.root]
    if missing:
        yield Note(
            "digest-not-recorded",
            f"of {some(missing)} only the digest of the header was recorded; `merge --digests full` records those of a local base",
        )
    if unlicensed := [part.name for part in bill.all if not part.license and not part.inputs]:
        yield Note("licence-not-known", f"no card states the licence of {', '.join(dict.fromkeys(unlicensed))}")
