"""Which rows of a table are wanted, and in which order: words that are parsed, and never evaluated.

    rank>16 and base~llama and bytes>=100MB

A condition is a field, a comparison and a value; conditions are joined by `and`. Of a field with several values, such as the
ranks of an adapter, one that fits is enough; `!=` and `!~` ask that none does.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loratool.errors import UsageError, printable
from loratool.options.described import amount, nearest
from loratool.results.fleet import LISTED, OF_VALUES, FleetRow

COUNTS = {  # field → what it is, with values that it has
    "rank": "a whole number, such as 16",
    "modules": "a whole number, such as 224",
    "parameters": "a whole number, such as 50000 or 1.5M",
    "bytes": "a size, such as 500kB or 100MB",
}
NUMBERS = {
    **COUNTS,
    "alpha": "a number, such as 16 or 0.5",
    "scale": "a number, such as 2 or 0.5",
    "norm": "a number of 0 or more, such as 2.5",
}
DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d)?)?Z?)?)?)?", re.ASCII)  # a year, a month, a day, or a time
FIRST = "0001-01-01T00:00:00"  # what a date that ends early goes on with
ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "!=": operator.eq,  # of none
}
CONTAINS = ("~", "!~")
CONDITION = re.compile(r"""\s*(\w+)\s*(<=|>=|==|!=|!~|<|>|=|~)\s*("[^"]*"|'[^']*'|[^\s"'<>=!~]+)\s*""")
AND = re.compile(r"and\b\s*", re.IGNORECASE)
EXAMPLE = 'such as "rank>16 and base~llama"'
SYNONYMS = {"format": "dialect", "size": "bytes", "ranks": "rank", "scaling": "scale", "target": "targets"}


@dataclass(frozen=True)
class Condition:
    """One comparison."""

    field: str
    comparison: str
    value: Any  # a number of a field of numbers, else text

    def holds(self, row: FleetRow) -> bool:
        values = values_of(row, self.field) or (() if self.field in NUMBERS else ("",))  # no text is found by ''
        found = [value for value in values if self.fits(value)]
        return not found if self.comparison.startswith("!") else bool(found)

    def fits(self, value: Any) -> bool:
        """Whether one value is as it is asked for; for `!=` and `!~`, whether it is what must not be."""
        if self.comparison in CONTAINS:
            return self.value.casefold() in str(value).casefold()
        if self.field == "date":  # as exact as the one that is asked for
            value = value[: len(self.value)]
        if self.field not in NUMBERS and self.field != "date":
            value = str(value)
        return ORDERED[self.comparison](value, self.value)


def values_of(row: FleetRow, field: str) -> tuple[Any, ...]:
    """What a row has of a field: nothing, one value or several."""
    value = getattr(row, field)
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


def conditions(text: str, with_values: bool) -> tuple[Condition, ...]:
    """What a text asks for. Raises `UsageError` where it is no condition, and says where."""
    found: list[Condition] = []
    at = 0
    while True:
        match = CONDITION.match(text, at)
        if match is None:
            raise not_understood(text, at, f"expected a field, a comparison and a value, {EXAMPLE}")
        found.append(condition(match[1], match[2].replace("==", "="), match[3].strip("\"'"), with_values))
        at = match.end()
        if at == len(text):
            return tuple(found)
        joined = AND.match(text, at)
        if joined is None:
            raise not_understood(text, at, "conditions are joined by `and`; put a value with spaces in quotes")
        at = joined.end()


def not_understood(text: str, at: int, why: str) -> UsageError:
    rest = text[at:].strip()
    where = f"at {printable(repr(rest))}" if rest else "at its end"
    return UsageError(f"--where {printable(repr(text))} is not understood {where}: {why}")


def condition(field: str, comparison: str, value: str, with_values: bool) -> Condition:
    """One condition, its value as the field has it. Raises `UsageError` where the field never has such a value."""
    name = field_named(field, "--where", with_values)
    shown = f"--where {name}{comparison}{printable(value)}"
    if name in NUMBERS:
        number = number_of(name, value)
        if number is None or comparison in CONTAINS:
            raise UsageError(f"{shown}: {name} is {NUMBERS[name]}; compare it with <, <=, =, !=, >= or >")
        return Condition(name, comparison, number)
    if name == "date":
        if comparison in CONTAINS or not is_date(value):
            raise UsageError(
                f"{shown}: write a date like 2026, 2026-03, 2026-03-31 or 2026-03-31T12:00, in UTC, and compare it with "
                "<, <=, =, !=, >= or >"
            )
        return Condition(name, comparison, value.removesuffix("Z"))  # rows are in UTC, and are cut to what is asked for
    if comparison in ("<", "<=", ">", ">="):
        raise UsageError(f"{shown}: {name} is text; compare it with =, !=, ~ (contains) or !~")
    return Condition(name, comparison, value)


def number_of(name: str, value: str) -> float | None:
    """The number that a value of a field is; None for what the field cannot be, such as half a rank."""
    if found := amount(value):
        number, counts_bytes = found
        if counts_bytes and name != "bytes":
            return None
        if name in COUNTS and value[-1].isalpha():
            number = round(number)  # 0.57k is 570, which a product of floats misses
    else:
        try:
            number = float(value)
        except ValueError:
            return None
    if not math.isfinite(number) or (name in COUNTS and number != int(number)):
        return None
    return None if number < 0 and name not in ("alpha", "scale") else number


def is_date(value: str) -> bool:
    """Whether the calendar has a date that is written like that."""
    stamp = value.removesuffix("Z")
    try:
        datetime.fromisoformat(stamp + FIRST[len(stamp) :])
    except ValueError:
        return False
    return DATE.fullmatch(value) is not None


def field_named(word: str, flag: str, with_values: bool) -> str:
    """The field that a word means. Raises `UsageError` naming all of them."""
    name = SYNONYMS.get(word.lower(), word.lower())
    if name not in LISTED:
        meant = f"; did you mean {near!r}?" if (near := nearest(name, LISTED)) else "."
        raise UsageError(f"{flag}: unknown field {printable(repr(word))}{meant} The fields are {', '.join(LISTED)}")
    if name in OF_VALUES and not with_values:
        raise UsageError(f"{flag}: {name} is known only with --values")
    return name


def sorted_by(rows: Iterable[FleetRow], order: str, with_values: bool) -> list[FleetRow]:
    """Rows in the order of some fields, separated by commas; `-` before one has the largest first. Rows without one come last."""
    found = list(rows)
    for word in reversed([word.strip() for word in order.split(",")]):
        falling = word.startswith("-")
        name = field_named(word.removeprefix("-"), "--sort", with_values)
        known = [row for row in found if values_of(row, name)]
        rest = [row for row in found if not values_of(row, name)]
        found = sorted(known, key=lambda row: sort_key(values_of(row, name)), reverse=falling) + rest
    return found


def sort_key(values: Sequence[Any]) -> Any:
    """The largest of several numbers, or several words as one."""
    return max(values) if isinstance(values[0], (int, float)) else ", ".join(map(str, values)).casefold()
