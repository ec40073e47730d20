"""`loratool rescale`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, OUT, click_options, output_options
from loratool.cli.screen import Screen
from loratool.commands.publish import with_push
from loratool.commands.rescale import RescaleAndPushOptions


@click.command()
@click.argument("adapter", type=OPERAND)
@OUT
@click_options(RescaleAndPushOptions)
@output_options
def rescale(adapter: Path, out: Path, options: RescaleAndPushOptions, screen: Screen) -> None:
    """Change the strength of an adapter.

    Without --bake only alpha changes and the tensors stay the same. With --bake the scaling is multiplied into the
    factors, for servers that read only alpha and r.

    \b
    Examples:
      loratool rescale ./my-adapter -o ./weaker --scale 0.5
      loratool rescale ./my-adapter -o ./even --spectral 1 --each
      loratool rescale ./my-adapter -o ./plain --bake --match 'mlp=0.8'
    """
    from loratool.reworking.rescale import rescale

    with screen.layers("measuring") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(rescale, (adapter, out), options, progress, push_progress)
    screen.show(report)
