"""What one worker did of a command whose partial results are in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.results.base import Result
from loratool.results.text import aligned, plural, row_if

NEXT = "once all workers have ended: the same command with --finish in place of --part"


@dataclass(frozen=True, repr=False)
class PartialReport(Result):
    """What one worker did of a command that several workers share."""

    into: Path  # the folder of partial results
    share: str  # such as 3/8
    made: int  # units of work that were done now
    kept: int  # those of this worker that were done before
    units: int  # of all workers

    def __str__(self) -> str:
        return aligned(
            [
                ("part", f"{self.share}, into {printable(self.into)}"),
                ("made", f"{self.made} of {plural(self.units, 'unit')} in {self.cost.seconds:.2f} s"),
                *row_if(self.kept, "kept", f"{plural(self.kept, 'unit')}, done before"),
                ("next", NEXT),
            ]
        )
