"""What a manifest's steps came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.results.base import Result
from loratool.results.text import aligned

UP_TO_DATE, MADE, TO_MAKE, TO_SEE = "up-to-date", "made", "to-make", "to-see"
WORDS = {
    UP_TO_DATE: "up to date",
    MADE: "made",
    TO_MAKE: "would be made",
    TO_SEE: "depends on an earlier step",
}


@dataclass(frozen=True)
class StepReport:
    """One step."""

    number: int  # from 1 on
    command: str
    out: Path
    status: str  # up-to-date, made, to-make or to-see
    reason: str  # why it was or would be made; empty where it is up to date
    digests: Mapping[str, str]  # file of the output → the root of its digests, or its SHA-256

    def __str__(self) -> str:
        reason = f"; reason: {self.reason}" if self.reason else ""
        return f"{self.command} → {printable(self.out)}, {WORDS[self.status]}{reason}"


@dataclass(frozen=True, repr=False)
class RunReport(Result):
    """What a manifest's steps came to."""

    manifest: Path
    steps: tuple[StepReport, ...]
    dry_run: bool

    def __str__(self) -> str:
        """A line for each step."""
        return aligned(
            [
                ("manifest", printable(self.manifest)),
                *((f"step {step.number}", step) for step in self.steps),
            ]
        )
