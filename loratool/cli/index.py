"""`loratool index`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.operands import Output
from loratool.cli.options import OPERAND, PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.files.system import shell_line
from loratool.inspecting.fleet.indexing import IndexOptions
from loratool.results.text import plural


@click.command()
@click.argument("paths", type=OPERAND, nargs=-1, required=True, metavar="PATH...")
@click.option("-o", "--output", "out", type=PATH, cls=Output, required=True, metavar="INDEX", help="File to write.")
@click_options(IndexOptions)
@output_options
def index(paths: tuple[Path, ...], out: Path, options: IndexOptions, screen: Screen) -> None:
    """Keep a sketch of every adapter in one file, for `loratool inspect ADAPTER --near INDEX`.

    \b
    Examples:
      loratool index ./adapters -o adapters.index
      loratool inspect ./my-adapter --near adapters.index
    """
    from loratool.inspecting.fleet.indexing import index

    with screen.bar("reading", unit=" adapters") as progress:
        report = index(paths, out, options, progress)
    screen.show(report)
    if report.exit_code:
        hint = shell_line(["loratool", "inspect", *map(str, paths)])
        reasons = [f"\n  {name}: {reason}" for name, reason in report.failed.items() if screen.quiet]
        told = f"{plural(len(report.failed), 'adapter')} not in the index{':' * bool(reasons)}{''.join(reasons)}"
        click.echo(f"Error: {told}\nhint: {hint}", err=True)
        raise click.exceptions.Exit(report.exit_code)
