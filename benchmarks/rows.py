"""The command line of a script whose rows are functions: `script.py --rows one,two --turns 3 --json result.json`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from findings import Finding, aligned, finding_table, write_result
from machine import describe
from running import say, scratch

Rows = Mapping[str, Callable[[Path, argparse.Namespace], list[Finding]]]


def parser_of(description: str | None, rows: Rows) -> argparse.ArgumentParser:
    """The options that all such scripts have; each may add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(rows), help=f"comma-separated [default: {','.join(rows)}]")
    add("--turns", type=int, default=3, help="runs of each contender; medians count [default: 3]")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make models [default: the system's]")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    return parser


def measure(parser: argparse.ArgumentParser, rows: Rows, name: str, arguments: Sequence[str] | None = None) -> None:
    """Measure the rows that are asked for in a folder that is removed, print what was found, and end after Ctrl-C."""
    options = parser.parse_args(arguments)
    chosen = options.rows.split(",")
    if unknown := sorted({*chosen} - {*rows}):
        parser.error(f"--rows: {', '.join(unknown)}: unknown; there are {', '.join(rows)}")
    try:
        with scratch(options.folder, name) as folder:
            facts = describe(folder, os.getloadavg()[0])
            findings = []
            for row in chosen:
                say(f"{row} …")
                findings += rows[row](folder, options)
            write_result(options.json, facts, findings, turns=options.turns)
        print("\n\n".join([aligned(list(facts.items())), finding_table(findings)]))
    except KeyboardInterrupt:
        sys.exit(130)
