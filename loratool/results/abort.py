"""What `merge --abort` removed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import aligned, plural, row_if


@dataclass(frozen=True, repr=False)
class AbortReport(Result):
    """What an unfinished output had left in a store, or a merge in parts next to a local one."""

    out: Path
    command: str  # what had begun it, such as merge or resize
    plan: str  # the fingerprint of the merge
    completed: bool  # whether its output was complete, and stays
    uploads: tuple[str, ...]  # files whose uploads were ended
    removed: tuple[str, ...]  # files that were removed
    notes: tuple[Note, ...] = ()

    def __str__(self) -> str:
        out = str(self.out)
        in_store = out.startswith("s3:/")
        removed = f"{plural(len(self.uploads), 'upload')} and {plural(len(self.removed), 'file')}"
        return aligned(
            [
                ("output", out.replace("s3:/", "s3://", 1)),
                ("begun by", self.command) if in_store else ("removed", f"{out}.partial"),
                *row_if(self.completed, "complete", "only leftovers were removed"),
                *row_if(in_store and not self.completed, "removed", removed),
                *(("note", note) for note in self.notes),
            ]
        )
