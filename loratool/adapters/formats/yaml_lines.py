"""The plain lines of a YAML file: mappings of names to scalars, nested by indentation.

Trainers write their settings so. Everything else, such as lists, anchors or text over several lines, is passed over with
all lines that belong to it: a setting that is not on a plain line counts as one that is not there. PyYAML, which reads
manifests, takes a hundred times the size of a file in memory and follows its anchors; these files are anybody's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import InputError, printable
from loratool.files.untrusted import read_bounded

LINE = re.compile(r"""(?P<key>[\w.-]+):(?: +(?P<value>"[^"]*"|'[^']*'|[^\s#].*?))?(?: +#.*)? *""", re.ASCII)
WORDS = {"true": True, "false": False, "null": None, "~": None}
# What all readers of YAML take for the same number: a leading zero makes it octal for some of them.
NUMBER = re.compile(r"[-+]?(?:(?P<whole>0|[1-9]\d{0,17})|(?:\d{1,18}\.\d{0,18}|\.\d{1,18}|\d{1,18}(?=[eE]))(?:[eE][-+]?\d{1,3})?)", re.ASCII)  # fmt: skip
BRACKETS = {"{": "}", "[": "]", '"': '"', "'": "'"}
DEEPEST = 32


@dataclass(frozen=True)
class Place:
    """A setting: what deeper lines are added to, or belong to."""

    indent: int
    table: dict[str, Any]  # that it is in
    key: str
    unfinished: bool = False  # whether its value may go on in lines that are no deeper

    def passed_over(self) -> None:
        self.table[self.key] = None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file as nested dicts. Raises `InputError` where it is no text, or names a setting twice."""
    try:
        text = read_bounded(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)}: not UTF-8 text") from None
    return settings_in(text, printable(path))


def settings_in(text: str, shown: str) -> dict[str, Any]:
    """The settings in a text; `shown` names it in messages."""
    top: dict[str, Any] = {"": {}}
    opened = [Place(-1, top, "")]  # those whose value is in the lines after them
    ended: Place | None = None  # the line whose value is on it, to which deeper lines belong
    for line in text.splitlines():
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        if not body or body.startswith("#"):
            continue
        if ended is not None and indent > ended.indent:
            ended.passed_over()
            continue
        if ended is not None and ended.unfinished:
            raise InputError(f"{shown}: {printable(ended.key)} is not on one line; expected one setting per line")
        item = body.startswith("- ") or body == "-"  # which may be as deep as the setting whose list it is in
        while indent < opened[-1].indent or (indent == opened[-1].indent and not item):
            opened.pop()
        place, match = opened[-1], LINE.fullmatch(body)
        table = place.table[place.key]
        if item or match is None or len(opened) > DEEPEST or table is None:
            ended = Place(indent, {}, body)
            if item and not table:
                place.passed_over()
            continue
        ended = added(table, match["key"], match["value"], indent, shown)
        if ended is None:
            opened.append(Place(indent, table, match["key"]))
    return top[""] or {}  # a list at the top has no settings


def with_number(content: bytes, path: tuple[str, ...], number: float) -> bytes | None:
    """The file with another number for one nested setting; None where that is on no line alone, or would change more."""
    text = content.decode("utf-8")
    lines, opened = text.splitlines(keepends=True), list[tuple[int, str]]()
    wanted: Any = settings_in(text, "")
    for name in path[:-1]:
        wanted = wanted.get(name) if isinstance(wanted, dict) else None
    if not isinstance(wanted, dict) or path[-1] not in wanted:
        return None
    for at, line in enumerate(lines):
        body = line.rstrip("\r\n").lstrip(" ")
        indent = len(line.rstrip("\r\n")) - len(body)
        if (match := LINE.fullmatch(body)) is None:
            continue
        opened = [*(each for each in opened if each[0] < indent), (indent, match["key"])]
        if tuple(key for _, key in opened) == path and match["value"] is not None:
            start, stop = (indent + place for place in match.span("value"))
            made = "".join([*lines[:at], line[:start], repr(number), line[stop:], *lines[at + 1 :]])
            return made.encode() if is_same_but(text, made, path, number) else None
    return None


def is_same_but(before: str, after: str, path: tuple[str, ...], number: float) -> bool:
    """Whether a setting is a number after a change, and all others are what they were."""
    old, new = settings_in(before, ""), settings_in(after, "")
    table: Any = old
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = number
    return old == new


def added(table: dict[str, Any], key: str, value: str | None, indent: int, shown: str) -> Place | None:
    """Take up a setting; None for one whose value is in the lines after it."""
    if key in table:
        raise InputError(f"{shown}: {printable(key)} appears twice")
    if value is None:
        table[key] = {}
        return None
    table[key] = scalar(value)
    closes = BRACKETS.get(value[0])
    return Place(indent, table, key, closes is not None and (len(value) < 2 or not value.endswith(closes)))


def scalar(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar; text in quotes loses them."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if match := NUMBER.fullmatch(text):
        return int(text) if match["whole"] else float(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
