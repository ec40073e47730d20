"""Where the time of a merge went, by thread and stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.files.stopwatch import Spent
from loratool.results.text import COLUMNS, table
from loratool.shown import Shown, size


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """What each stage took. Its `str` is the table that `loratool merge -vv` prints."""

    threads: Mapping[str, Mapping[str, Spent]]  # thread → stage → what it spent there

    @property
    def stages(self) -> dict[str, Spent]:
        """What each stage took in all threads together."""
        found: dict[str, Spent] = {}
        for stages in self.threads.values():
            for stage, spent in stages.items():
                found.setdefault(stage, Spent()).add(spent)
        return found

    def __str__(self) -> str:
        header = ("thread", "stage", "CPU s", "wall s", "bytes", "per thread")
        rows = [line("all", stage, spent) for stage, spent in self.stages.items()]
        rows += [line(name, stage, spent) for name, stages in self.threads.items() for stage, spent in stages.items()]
        return table(header, rows, room=COLUMNS)


def line(thread: str, stage: str, spent: Spent) -> tuple[str, ...]:
    """One row of the table. A rate is that of a thread that does nothing else."""
    passed = size(spent.bytes) if spent.bytes else ""
    rate = f"{size(spent.bytes / spent.wall)}/s" if spent.bytes and spent.wall else ""
    return thread, stage, f"{spent.processor:.2f}", f"{spent.wall:.2f}", passed, rate
