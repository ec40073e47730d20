"""What a command shows: a bar on stderr while it works, and its result on stdout, as JSON or text with charts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from loratool.arguments import Progress
from loratool.errors import escaped
from loratool.notes import as_records

NOTES = "loratool.notes"  # key of a context's `meta`: notes of operands that were not read as they were typed
VERBOSITY = "loratool.verbosity"  # key of a context's `meta`: how often `-v` was given


@dataclass(frozen=True)
class Screen:
    """Where a command shows things, as `--json` and `-q` have it."""

    as_json: bool
    quiet: bool

    def show(self, result: Any, *text: object) -> None:
        """Print a result: as JSON, or as `text` in parts, which is the result itself if there is none.

        Its warnings go to stderr besides. A terminal gets text that fits into it; a file or a pipe gets it whole.
        """
        from loratool.results.base import SCHEMA, Result, plain

        if not self.quiet:
            for note in getattr(result, "notes", ()):
                if note.is_warning:
                    click.echo(f"warning: {note}", err=True)
            if click.get_current_context().meta.get(VERBOSITY, 0) > 1 and hasattr(result, "profile"):
                click.echo(f"{result.profile}\n", err=True)
        if self.as_json:
            table = result.to_dict() if isinstance(result, Result) else {"schema": SCHEMA, **plain(result)}
            if notes := click.get_current_context().meta.get(NOTES):
                table["operands"] = as_records(notes)
            click.echo(json.dumps(table, indent=2, allow_nan=False))
        elif not self.quiet:
            from loratool.results.text import ENDLESS, fitting

            columns = ENDLESS
            if sys.stdout.isatty():
                from shutil import get_terminal_size  # which brings packages of archives

                columns = get_terminal_size().columns
            with fitting(columns):
                click.echo(escaped("\n\n".join(map(str, text or [result])), keep="\n"))
            show_charts(result["results"] if isinstance(result, dict) and "results" in result else [result])

    @property
    def is_watched(self) -> bool:
        """Whether somebody sees a bar."""
        return not self.quiet and sys.stderr.isatty()

    @contextmanager
    def bar(self, word: str, **looks: Any) -> Iterator[Progress | None]:
        """What moves a bar on stderr, or None where nobody is looking.

        It appears with the first progress, so that two of them do not stand there at once.
        """
        if not self.is_watched:
            yield None
            return
        from tqdm import tqdm

        shown: list[Any] = []

        def progress(done: int, total: int) -> None:
            if not shown:
                shown.append(tqdm(desc=word, total=total, file=sys.stderr, leave=False, **looks))
            shown[0].total = total
            shown[0].update(done - shown[0].n)

        try:
            yield progress
        finally:
            for each in shown:
                each.close()


def show_charts(results: Iterable[Any]) -> None:
    """What a terminal shows below the text of results: bars and heat maps; to a file or a pipe goes the text alone."""
    if not sys.stdout.isatty():
        return
    from loratool.pictures.charts import charts_of

    if figures := [figure for result in results for figure in charts_of(result)]:
        from loratool.pictures.terminal import shown, terminal_of

        if (terminal := terminal_of(sys.stdout)) and (text := shown(figures, terminal)):
            click.echo(f"\n{text}")
