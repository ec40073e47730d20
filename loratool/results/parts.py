"""Of a merge that many machines make: what one worker did, how far all of them are, and what `--finish` did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result, Written
from loratool.results.merge import MergeReport
from loratool.results.partial import NEXT
from loratool.results.profile import Profile
from loratool.results.text import aligned, plural, row_if
from loratool.shown import size
from loratool.templates import some

MOST_NAMED = 5  # parts that are named


@dataclass(frozen=True, repr=False)
class PartReport(Result):
    """What one worker did of a merge. Sizes are bytes."""

    out: Path
    share: str  # such as 3/8
    plan: str  # the fingerprint of the merge, alike for all workers
    made: tuple[str, ...]  # parts that were made now
    kept: tuple[str, ...]  # parts of the share that were there already, with the bytes that their records list
    redone: dict[str, str]  # of those made, the ones that had a record, and what was wrong
    bytes_written: int
    published: bool  # whether the output was complete already, so that there was nothing to do
    notes: tuple[Note, ...]
    workers: int = 0  # threads that made them
    profile: Profile = field(default=Profile({}), compare=False)  # where the time went

    def __str__(self) -> str:
        if self.published:
            return aligned([("output", f"{printable(self.out)} is complete already; nothing to do")])
        return aligned(
            [
                ("part", f"{self.share} of {printable(self.out)}"),
                ("made", f"{plural(len(self.made), 'part')}, {size(self.bytes_written)} in {self.cost.seconds:.2f} s"),
                *row_if(self.kept, "kept", f"{plural(len(self.kept), 'part')}, made before and still correct"),
                *(("made again", f"{name}: {reason}") for name, reason in sorted(self.redone.items())),
                *(("note", note) for note in self.notes),
                ("next", NEXT),
            ]
        )


@dataclass(frozen=True)
class Running:
    """A process that makes parts, or finishes the output, as it said of itself."""

    worker: str
    share: str  # such as 3/8, or --finish
    parts: tuple[str, ...]  # those that it is making
    seconds: float  # since its last sign of life, of which there is one every ten seconds
    alive: bool  # whether it seems to be running


@dataclass(frozen=True, repr=False)
class PartsStatus(Result):
    """How far a merge in parts is, by its records; no data is read. Sizes are bytes."""

    out: Path
    plan: str
    published: bool
    parts: int
    done: dict[str, str]  # part → the worker that made it
    missing: tuple[str, ...]  # parts without a record
    running: tuple[Running, ...]
    bytes_done: int
    bytes_all: int
    notes: tuple[Note, ...] = ()

    def __str__(self) -> str:
        notes: list[tuple[str, object]] = [("note", note) for note in self.notes]
        if self.published:
            return aligned([("output", f"{printable(self.out)} is complete"), *notes])
        makers = [f"{worker} ({plural(count, 'part')})" for worker, count in Counter(self.done.values()).most_common()]
        making = {part for each in self.running if each.alive for part in each.parts}
        waiting = [name for name in self.missing if name not in making]
        done = f"{len(self.done)} of {plural(self.parts, 'part')}, {size(self.bytes_done)} of {size(self.bytes_all)}"
        return aligned(
            [
                ("output", printable(self.out)),
                ("fingerprint", self.plan[:16]),
                ("done", done),
                *row_if(makers, "made by", some(makers, MOST_NAMED)),
                *(("running", running_line(each)) for each in self.running),
                *row_if(waiting, "missing", some(waiting, MOST_NAMED)),
                *row_if(not self.missing, "next", "--finish"),
                *notes,
            ]
        )


def running_line(each: Running) -> str:
    """One worker, for people."""
    parts = ", ".join(each.parts[:MOST_NAMED]) + (", …" if len(each.parts) > MOST_NAMED else "")
    heard = f"last heard from {each.seconds:.0f} s ago" + ("" if each.alive else ", seems to be dead")
    return f"{printable(each.worker)}: {printable(each.share)}, {heard}" + (f": {printable(parts)}" if parts else "")


@dataclass(frozen=True, repr=False)
class FinishReport(Written):
    """What `--finish` did."""

    out: Path
    plan: str
    parts: int
    workers: tuple[str, ...]  # those who made the parts
    published: bool  # by this run; otherwise the output was complete already
    merge: MergeReport | None  # all that is to be said of the merge; None where it was not this run that published it

    @property
    def notes(self) -> tuple[Note, ...]:
        """Those of the merge."""
        return self.merge.notes if self.merge else ()

    def text(self) -> str:
        if self.merge is None:
            return aligned([("output", f"{printable(self.out)} is complete already; nothing was changed")])
        first = aligned([("parts", f"{plural(self.parts, 'part')}, made by {plural(len(self.workers), 'worker')}")])
        return f"{first}\n{self.merge.text()}"
