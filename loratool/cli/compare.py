"""`loratool compare`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, click_options, output_options
from loratool.cli.screen import Screen
from loratool.reworking.compare import CompareOptions


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER ADAPTER...")
@click_options(CompareOptions)
@output_options
def compare(adapters: tuple[Path, ...], options: CompareOptions, screen: Screen) -> None:
    """Measure how similar adapters are and how much they interfere.

    \b
    Example: loratool compare ./style ./facts
    """
    from loratool.reworking.compare import compare

    with screen.layers("comparing") as progress:
        report = compare(adapters, options, progress)
    screen.show(report)
