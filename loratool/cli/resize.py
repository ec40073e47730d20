"""`loratool resize`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, OUT, click_options, output_options
from loratool.cli.screen import Screen
from loratool.commands.publish import with_push
from loratool.commands.resize import ResizeAndPushOptions


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click_options(ResizeAndPushOptions)
@output_options
def resize(adapter: Path, out: Path, options: ResizeAndPushOptions, screen: Screen) -> None:
    """Change the ranks of an adapter by SVD: each layer gets the best approximation at its new rank.

    \b
    Examples:
      loratool resize ./my-adapter -o ./small --rank 8
      loratool resize ./my-adapter -o ./small --energy 0.99 --uniform
      loratool resize ./my-adapter -o ./small --budget 16MB
    """
    from loratool.reworking.resize import resize

    with screen.layers("resizing") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(resize, (adapter, out), options, progress, push_progress)
    screen.show(report)
