"""The plain lines of a YAML file: mappings of names to scalars, nested by indentation.

Trainers write their settings so. Everything else, such as lists, anchors or text over several lines, is passed over: a
setting that is not on a plain line counts as one that is not there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loratool.errors import InputError, printable
from loratool.files.inputs import read_bounded

LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?: +(?P<value>.*?))? *")
COMMENT = re.compile(r" +#.*$")
WORDS = {"true": True, "false": False, "null": None, "~": None}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
DEEPEST = 32


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file as nested dicts. Raises `InputError` where it is no text, or names a setting twice."""
    try:
        text = read_bounded(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)}: not UTF-8 text") from None
    return settings_in(text, printable(path))


def settings_in(text: str, shown: str) -> dict[str, Any]:
    """The settings in a text; `shown` names it in messages."""
    found: dict[str, Any] = {}
    open_tables: list[tuple[int, dict[str, Any]]] = [(-1, found)]  # (indent of the key, what is under it)
    for line in text.splitlines():
        match = LINE.fullmatch(COMMENT.sub("", line))
        indent = len(line) - len(line.lstrip(" "))
        if line.strip() and not line.lstrip(" ").startswith("#"):
            while indent <= open_tables[-1][0]:
                open_tables.pop()
        if match is None or len(open_tables) > DEEPEST:
            continue
        table, key, value = open_tables[-1][1], match["key"], match["value"]
        if key in table:
            raise InputError(f"{shown}: {printable(key)} appears twice")
        if value:
            table[key] = scalar(value)
        else:
            table[key] = {}
            open_tables.append((indent, table[key]))
    return found


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar; text in quotes loses them."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
