"""What a check finds: one thing at a time, in a sentence, with the command that repairs it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratool.errors import escaped, printable

MOST_NAMED = 3  # names that a sentence repeats


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


def some(names: Sequence[str]) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(map(printable, names[:MOST_NAMED]))
    return shown + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def command(verb: str, path: Path, options: str = "", out: str = "OUT") -> str:
    """A command line on an adapter."""
    return " ".join(filter(None, ["loratool", verb, quoted(path), "-o", out, options]))


def quoted(path: Path) -> str:
    """A path as a shell takes it; what is no printable text is shown as it would be elsewhere."""
    return shlex.quote(printable(path))
