"""Measured numbers, each with its target, and the JSON that `numbers.py` writes the tables of the pages from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import code, commit

SHOWN_FOLDERS = ("/dev/shm",)


@dataclass(frozen=True)
class Finding:
    """One line of the result: what was wanted and what was measured, in words and as a number."""

    what: str
    measured: str
    value: float
    target: str = ""
    met: bool | None = None  # None where nothing was promised
    note: str = ""
    aimed: bool | None = None  # whether it reaches the aim too; None without one


Show = Callable[[float], str]


def at_most(
    what: str, value: float, limit: float | None, show: Show, aim: float | None = None, note: str = ""
) -> Finding:
    return judged(what, value, ("≤", limit, aim), show, note)


def at_least(
    what: str, value: float, limit: float | None, show: Show, aim: float | None = None, note: str = ""
) -> Finding:
    return judged(what, value, ("≥", limit, aim), show, note)


def judged(what: str, value: float, limits: tuple[str, float | None, float | None], show: Show, note: str) -> Finding:
    sign, limit, aim = limits
    if limit is None:
        return Finding(what, show(value), value, note=note)

    def reaches(least: float) -> bool:
        return value <= least if sign == "≤" else value >= least

    if aim is None:
        return Finding(what, show(value), value, f"{sign} {show(limit)}", reaches(limit), note)
    target = f"{sign} {show(limit)}, aim {show(aim)}"
    return Finding(what, show(value), value, target, reaches(limit), note, reaches(aim))


def ratio(value: float) -> str:
    return f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def multiple(value: float) -> str:
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def kilobytes(value: float) -> str:
    return f"{value / 1e3:.0f} kB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def verdict(met: bool | None, aimed: bool | None = None) -> str:
    if met is None:
        return ""
    return "aim met" if met and aimed else "met" if met else "missed"


def finding_table(findings: Sequence[Finding]) -> str:
    rows = [("what", "target", "measured", "", "")]
    rows += [
        (found.what, found.target, found.measured, verdict(found.met, found.aimed), found.note) for found in findings
    ]
    return aligned(rows)


def write_result(path: Path | None, facts: dict[str, str], findings: Sequence[Finding], **more: Any) -> None:
    """The findings of one script on one machine, with the command, the commit and the machine."""
    if path is None:
        return
    table = {
        "benchmark": Path(sys.argv[0]).stem,
        "command": command(sys.argv),
        "commit": commit(),
        "code": code(),
        "machine": facts,
        **more,
        "findings": [asdict(found) for found in findings],
    }
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    if path.exists() and not path.is_file():  # a device or a pipe is written to, and never replaced
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def command(words: Sequence[str]) -> str:
    """The command line as a page shows it: without the file of the result, and without folders of this machine."""
    shown, rest = ["python", f"benchmarks/{Path(words[0]).name}"], list(words[1:])
    while rest:
        word = rest.pop(0)
        if word == "--json" and rest:
            rest.pop(0)
        elif word == "--over" and rest:
            shown += [word, Path(rest.pop(0)).name]
        elif not word.startswith("--json="):
            shown.append("DIR" if word.startswith("/") and word not in SHOWN_FOLDERS else word)
    return " ".join(shown)
