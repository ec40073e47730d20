"""Commands that look at what is there: `loratool inspect` and `loratool demo`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.words import PATH, output_options, show


@click.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="PATH...")
@output_options
def inspect(paths: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Tell what is in an adapter or a checkpoint, from headers alone.

    \b
    Example: loratool inspect ./my-adapter ./Llama-3.2-1B
    """
    from loratool.inspecting import inspect

    facts = [inspect(path) for path in paths]
    show({"results": facts}, lambda: "\n\n".join(map(str, facts)), as_json, quiet)


@click.command(short_help="Make, merge and check a small model from nothing.")
@click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left in DIR.")
@output_options
def demo(folder: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Build a small base and an adapter, merge them, and check the result against the formula.

    \b
    Example: loratool demo ./loratool-demo
    """
    from loratool.demo import demo

    result = demo(folder, overwrite=overwrite)
    show(result, lambda: str(result), as_json, quiet)
