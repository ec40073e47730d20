"""`loratool inspect`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from loratool.cli.options import LAYERS, OPERAND, PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.inspecting.inspect import InspectOptions


@click.command()
@click.argument("paths", type=OPERAND, nargs=-1, required=True, metavar="PATH...")
@click_options(InspectOptions)
@click.option("--html", type=PATH, metavar="FILE", help="Write an HTML report with figures; implies --values.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it was written by inspect --html.")
@output_options
def inspect(
    paths: tuple[Path, ...], html: Path | None, overwrite: bool, options: InspectOptions, screen: Screen
) -> None:
    """Show what adapters and checkpoints contain, by default from their headers only.

    \b
    Examples:
      loratool inspect ./my-adapter ./Llama-3.2-1B
      loratool inspect ./my-adapter --base ./Llama-3.2-1B --values --check
      loratool inspect ./my-adapter --html my-adapter.html
    """
    from loratool.inspecting.inspect import exit_code_of, inspect

    if html is not None:
        from loratool.pictures.page import check_page

        check_page(html, overwrite)
        options = replace(options, values=True)
    facts = []
    for path, way in zip(paths, options.readings(len(paths)), strict=True):
        with screen.bar("measuring", **LAYERS) as progress:
            facts.append(inspect(path, options, progress, way))
    if html is not None:
        from loratool.pictures.page import write_page

        write_page(facts, html, overwrite)
    screen.show({"results": facts}, "\n\n".join(map(str, facts)))
    if codes := [code for code in map(exit_code_of, facts) if code]:
        raise click.exceptions.Exit(min(codes))
