"""What a check found, one thing at a time, and the command that repairs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratool.errors import escaped, printable
from loratool.files.system import shell_word
from loratool.results.text import fill

NOT_AS_WRITTEN = "not-as-written"  # the code of a problem: another file than loratool wrote


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    level: Literal["problem", "note"]  # problems make a check end with exit code 3
    code: str  # what kind of thing: a word that stays the same from release to release
    message: str
    repair: str = ""  # a command, or what to do where there is none; empty where nothing can be done
    where: tuple[str, ...] = ()  # targets or tensors

    def __post_init__(self) -> None:
        for name in ("message", "repair"):  # they repeat what stands in files
            object.__setattr__(self, name, escaped(getattr(self, name)))


def worst(codes: Iterable[int]) -> int:
    """The exit code of several: the smallest that is not 0."""
    return min(filter(None, codes), default=0)


def command(verb: str, path: Path, options: str = "") -> str:
    """A command line on an adapter."""
    return " ".join(filter(None, ["loratool", verb, quoted(path), "-o", "OUT", options]))


def quoted(path: Path) -> str:
    """A path as a shell takes it; what is no printable text is shown as it would be elsewhere."""
    return shell_word(printable(path))


def findings_text(findings: Sequence[Finding]) -> str:
    """Problems and notes, each with what repairs it."""
    problems = sum(finding.level == "problem" for finding in findings)
    notes = len(findings) - problems
    count = f"{problems} problem{'s' * (problems != 1)}, {notes} note{'s' * (notes != 1)}"
    lines = [f"health: {count}" if findings else "health: no problems found"]
    for finding in findings:
        lines.append(fill(f"{finding.code}: {finding.message}", f"  {finding.level:<8}", " " * 10))
        if finding.repair:
            lines.append(fill(printable(finding.repair), "          → ", " " * 12))
    return "\n".join(lines)
