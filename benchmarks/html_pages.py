"""A row of `people.py`: the pages that `--html` writes, how large they are, and when a browser has painted them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from findings import Finding, at_most, kilobytes, seconds
from painting import first_paint
from running import apart, run_quickly

LARGEST, PAINTED = 1.5e6, 1.0  # bytes, seconds
COMPARED = 50  # adapters in one matrix


def pages(folder: Path, options: argparse.Namespace, make_headers: Callable[..., None]) -> list[Finding]:
    """Of every kind of result: a fleet of `--count` adapters, a matrix of 50, and the commands of the demo's files."""
    many = folder / "fleet"
    apart(make_headers, many, options.count, True)
    loratool("demo", folder / "demo", "-q")
    demo = folder / "demo"
    base, adapter, merged = demo / "base", demo / "adapter", demo / "merged"
    (folder / "alike").mkdir()
    for number in range(COMPARED):
        loratool("rescale", adapter, "-o", folder / "alike" / str(number), "--scale", str(1 + number), "-q")
    commands: dict[str, tuple[str | Path, ...]] = {
        f"inspect {options.count} adapters": ("inspect", many),
        f"compare {COMPARED} adapters": ("compare", *sorted((folder / "alike").iterdir())),
        "inspect": ("inspect", adapter, "--values"),
        "merge": ("merge", base, adapter, "-o", folder / "merged"),
        "verify": ("verify", merged, "--base", base, "--adapter", adapter),
        "resize": ("resize", adapter, "-o", folder / "resized", "--rank", "2"),
        "combine": ("combine", adapter, folder / "alike" / "1", "-o", folder / "combined"),
        "extract": ("extract", base, merged, "-o", folder / "extracted", "--rank", "4"),
        "estimate": ("estimate", "--preset", "llama-2-7b", "--rank", "8", "--target", "q_proj,v_proj"),
    }
    return [
        found
        for name, words in commands.items()
        for found in judged(name, folder / f"{name}.html", words, options.turns)
    ]


def judged(name: str, page: Path, words: tuple[str | Path, ...], turns: int) -> Iterator[Finding]:
    """What a page was promised to be, and is; its time is left out where there is no browser."""
    loratool(*words, "--html", page, "-q")
    yield at_most(f"page of `{name}`: size", page.stat().st_size, LARGEST, kilobytes)
    if (painted := first_paint(page, turns)) is not None:
        yield at_most(f"page of `{name}`: first paint in chromium", painted, PAINTED, seconds)


def loratool(*words: str | Path) -> None:
    run_quickly(["-m", "loratool", *map(str, words)])
