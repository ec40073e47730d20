"""`Result`: what a function returns and its command prints, as the data that `--json` shows."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import as_typed
from loratool.files.process import peak_memory
from loratool.shown import Shown

LINES_IN_A_NOTEBOOK = 60
SCHEMA = 1  # of the objects that `--json` prints; fields may be added without a new number


@dataclass(frozen=True)
class Cost:
    """What a command took. Times are seconds, memory is bytes."""

    device: str = ""  # empty where nothing was computed
    seconds: float = 0.0
    startup_seconds: float = 0.0  # of `seconds`: until torch and the devices were ready
    peak_memory: int = 0  # resident set of the whole process

    @classmethod
    def since(cls, started: float, device: str = "", startup_seconds: float = 0.0) -> Cost:
        """What a command that began at that second of `time.monotonic` has taken so far."""
        return cls(device, time.monotonic() - started, startup_seconds, peak_memory())


@dataclass(frozen=True, kw_only=True, repr=False)
class Result(Shown):
    """What is common to all reports, facts and plans; each is a frozen dataclass besides."""

    cost: Cost = dataclasses.field(default=Cost(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists, text and numbers: the object that the command prints with `--json`."""
        return {"schema": SCHEMA, **plain(self)}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002 (IPython's protocol)
        """What a notebook shows of a cell that ends with this: the text, cut where it is long; among others, the `repr`."""
        if len(printer.stack) > 1:
            printer.text(repr(self))
            return
        lines = str(self).splitlines()
        more = len(lines) - LINES_IN_A_NOTEBOOK
        if more > 0:
            lines[LINES_IN_A_NOTEBOOK:] = [f"… and {more} more lines; print() shows all of them"]
        printer.text("\n".join(lines))


@dataclass(frozen=True, kw_only=True, repr=False)
class Written(Result):
    """What a command did that writes an output, and pushes it to the Hub where that is asked for."""

    pushed: Result | None = None  # what `push` did

    def text(self) -> str:
        """The report, without that of the push."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join([self.text(), *([str(self.pushed)] if self.pushed else [])])


def plain(value: Any) -> Any:
    """`value` as JSON takes it: dataclasses become objects, paths text, and numbers that JSON has not null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return as_typed(os.fspath(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
