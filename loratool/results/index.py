"""What `index` did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import COLUMNS, aligned, fill, memory, plural, shortened
from loratool.shown import size


@dataclass(frozen=True, repr=False)
class IndexReport(Result):
    """An index of sketches, and what is not in it."""

    out: Path
    adapters: tuple[str, ...]  # names of those in it
    bytes: int  # of the index
    failed: dict[str, str]  # adapter → why it is not in it
    left_out: tuple[str, ...]  # models and other files that are no adapters
    notes: tuple[Note, ...] = ()
    exit_code: int = 0  # the worst of all adapters that are not in it

    def __str__(self) -> str:
        """How many adapters the index has, and what is missing."""
        rows: list[tuple[str, object]] = [
            ("index", self.out),
            ("adapters", len(self.adapters)),
            ("size", size(self.bytes)),
            ("took", f"{self.cost.seconds:.2f} s"),
            ("peak memory", memory(self.cost.peak_memory)),
            *(("note", note) for note in self.notes),
        ]
        parts = [aligned(rows, COLUMNS)]
        if self.failed:
            lines = [fill(f"{name}: {why}", "  ", "    ") for name, why in self.failed.items()]
            parts.append("\n".join([f"{plural(len(lines), 'adapter')} not in the index:", *shortened(lines)]))
        if self.left_out:
            parts.append(fill(", ".join(shortened(self.left_out, 4)), f"not adapters ({len(self.left_out)}): ", "    "))
        return "\n\n".join(parts)
