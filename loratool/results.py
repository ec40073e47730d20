"""`Result`: what a function returns and its command prints, as the data that `--json` shows."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Result:
    """What is common to all reports, facts and plans; each is a frozen dataclass besides."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists, text and numbers: the object that the command prints with `--json`."""
        table: dict[str, Any] = plain(self)
        return table


def plain(value: Any) -> Any:
    """`value` as JSON takes it: dataclasses become objects, paths text, and numbers that JSON has not null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
