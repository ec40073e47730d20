"""`Note`: something that a user should know and that is no reason to refuse.

What was guessed, renamed, left out or assumed is a note of the report, of `--json` and of `loratool.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratool.errors import escaped

# Codes of notes that the command line prints on stderr as warnings too.
WARNINGS = frozenset(
    {
        "adapter-not-finite",
        "adapter-without-effect",
        "alpha-is-zero",
        "expert-layout-assumed",
        "file-not-used",
        "fp8-cast",
        "gain-not-measurable",
        "no-common-layer",
        "not-taken-out",
        "peft-loses-layers",
        "update-lost-in-rounding",
    }
)
BASE_NAMED = "base-named"  # of the words that were typed, not of the result: no record has it


@dataclass(frozen=True)
class Note:
    """One sentence for people, and a code for programs that stays the same when the sentence is improved."""

    code: str  # a constant in kebab-case, never derived from the text
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", escaped(self.text))  # it repeats what stands in files

    def __str__(self) -> str:
        return self.text

    def under(self, name: str) -> Note:
        """The same note of a named input."""
        return Note(self.code, f"{name}: {self.text}")

    @property
    def is_warning(self) -> bool:
        """Whether it says that the result is probably not what was wanted."""
        return self.code in WARNINGS


def as_records(notes: Iterable[Note]) -> list[dict[str, str]]:
    """Notes as `loratool.json` and `--json` hold them."""
    return [{"code": note.code, "text": note.text} for note in notes]
