"""What a check finds: one thing at a time, in a sentence, with the command that repairs it."""

from __future__ import annotations

from pathlib import Path

from loratool.errors import printable
from loratool.files.system import shell_word
from loratool.templates import some

__all__ = ["command", "quoted", "some"]


def command(verb: str, path: Path, options: str = "") -> str:
    """A command line on an adapter."""
    return " ".join(filter(None, ["loratool", verb, quoted(path), "-o", "OUT", options]))


def quoted(path: Path) -> str:
    """A path as a shell takes it; what is no printable text is shown as it would be elsewhere."""
    return shell_word(printable(path))
