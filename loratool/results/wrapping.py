"""Texts of results that are broken into lines of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from loratool.errors import escaped
from loratool.results.text import COLUMNS


def wrapped(rows: Iterable[tuple[str, object]]) -> str:
    """`name  value` lines, values in one column and broken between words where they are longer than the line."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0) + 2
    lines = []
    for name, value in pairs:
        start = f"{name:<{width}}"
        lines.append(fill(str(value), start, " " * width))
    return "\n".join(lines)


def fill(text: str, first: str, later: str) -> str:
    """Text in lines of 80 columns; a word that is longer, such as a path, stays whole."""
    found = textwrap.fill(
        escaped(text),
        COLUMNS,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return found or first.rstrip()
