"""`loratool extract`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, OUT, click_options, output_options
from loratool.cli.screen import Screen
from loratool.commands.extract import ExtractAndPushOptions
from loratool.commands.publish import with_push


@click.command()
@click.argument("base", type=OPERAND)
@click.argument("tuned", type=OPERAND)
@OUT
@click_options(ExtractAndPushOptions)
@output_options
def extract(base: Path, tuned: Path, out: Path, options: ExtractAndPushOptions, screen: Screen) -> None:
    """Extract an adapter from a full fine-tune: the difference TUNED − BASE, as closely as the ranks allow.

    \b
    Examples:
      loratool extract ./base ./fine-tuned -o ./adapter
      loratool extract ./base ./fine-tuned -o ./adapter --rank 64 --exclude embed
    """
    from loratool.reworking.extracting.extract import extract

    with screen.layers("extracting") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(extract, (base, tuned, out), options, progress, push_progress)
    screen.show(report)
