"""What a person is shown: a number of bytes, and a short `repr` in a notebook.

The `repr` is the name and the first fields in a few words each. `reprlib` shortens each value, but not their sum, and shows the entries of a collection instead of their number.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

LONGEST = 400  # characters of a `repr`, the ellipsis apart
LONGEST_VALUE = 60


def size(count: float) -> str:
    """A number of bytes with its unit, in powers of 1000 as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Shown:
    """For dataclasses that are made with `repr=False`."""

    def __repr__(self) -> str:
        parts: list[str] = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.repr:
                parts.append(f"{field.name}={brief(getattr(self, field.name))}")
            if sum(map(len, parts)) > LONGEST:
                return f"{type(self).__name__}({', '.join(parts[:-1])}, …)"
        return f"{type(self).__name__}({', '.join(parts)})"


def brief(value: Any) -> str:
    """A value in at most 60 characters: collections as a count, other dataclasses by their name."""
    if isinstance(value, (str, bytes, os.PathLike)):
        text = repr(os.fspath(value))
    elif isinstance(value, Mapping):
        text = f"{{{len(value)} {'entry' if len(value) == 1 else 'entries'}}}" if value else "{}"
    elif isinstance(value, Collection):
        text = f"({len(value)} item{'s' * (len(value) != 1)})" if value else "()"
    elif dataclasses.is_dataclass(value):
        text = f"{type(value).__name__}(…)"
    else:
        text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}…{text[-LONGEST_VALUE // 2 + 1 :]}"
