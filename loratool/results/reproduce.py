"""What came of repeating the run that made an output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.errors import VerificationError, printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import aligned, shortened


@dataclass(frozen=True)
class FoundInput:
    """An input of a run that was repeated."""

    role: str
    name: str
    place: str
    how: str  # how it was found, in a few words


@dataclass(frozen=True)
class Difference:
    """A file that is not the same again."""

    name: str
    reason: str


@dataclass(frozen=True, repr=False)
class ReproduceReport(Result):
    """What came of repeating the run that made an output."""

    out: Path  # the new output
    command: str
    inputs: tuple[FoundInput, ...]
    files: int  # that were compared
    differences: tuple[Difference, ...]
    notes: tuple[Note, ...]

    @property
    def passes(self) -> bool:
        """Whether every file has the same bytes."""
        return not self.differences

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return 0 if self.passes else VerificationError.exit_code

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        if self.passes:
            return f"reproduced: all {self.files} files have the same bytes"
        return f"{len(self.differences)} of {self.files} files differ"

    @property
    def failures(self) -> tuple[str, ...]:
        """The files that differ, and how."""
        return tuple(f"{each.name}: {each.reason}" for each in self.differences)

    def __str__(self) -> str:
        """What was repeated, and what differs."""
        return aligned(
            [
                ("repeated", self.command),
                ("into", printable(self.out)),
                *((each.role, f"{printable(each.name)}, {printable(each.how)}") for each in self.inputs),
                ("result", self.sentence),
                *(("differs", line) for line in shortened(self.failures)),
                *(("note", note) for note in self.notes),
            ]
        )
