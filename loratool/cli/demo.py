"""`loratool demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from loratool.cli.options import PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.options.described import FLAG, Options, option


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Of `demo`."""

    overwrite: bool = option(help="Replace the output of an earlier demo in DIR.", default=False, kind=FLAG)


@click.command(short_help="Build a small base and adapter, merge them and check the result.")
@click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]")
@click_options(DemoOptions)
@output_options
def demo(folder: Path, options: DemoOptions, screen: Screen) -> None:
    """Build a small base and an adapter, merge them, and check the result against the formula.

    \b
    Example: loratool demo ./loratool-demo
    """
    from loratool.demo import demo

    screen.show(demo(folder, overwrite=options.overwrite))
