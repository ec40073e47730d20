"""What `demo` made, and what the check of it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.files.system import shell_line
from loratool.results.base import Result
from loratool.results.merge import MergeReport
from loratool.results.text import ENDLESS, fill

INDENT = 20  # columns before what is said of a merge


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """What the demo made and what the check found."""

    folder: Path
    merge: MergeReport
    elements: int  # of edited weights
    equal: int  # that are the float64 formula rounded once
    one_step: int  # that are its neighbour
    copied: int  # tensors compared byte for byte

    def __str__(self) -> str:
        share = 100 * self.equal / self.elements
        base, adapter, out = (f"{self.folder}/{name}" for name in ("base", "adapter", "again"))
        rows = {
            "checked": f"{self.elements:,} edited weights against W + (α/r)·BA in float64, rounded once:",
            "": f"{share:.4f} % equal, {self.one_step} differ in the last bit, none by more; {self.copied} other tensors "
            "equal byte for byte",
            "by hand": shell_line(["loratool", "merge", base, adapter, "-o", out]),
        }
        lines = (fill(text, f"{name:<{INDENT}}", " " * INDENT, ENDLESS) for name, text in rows.items())
        return "\n".join([str(self.merge), *lines])
