"""`loratool estimate`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, click_options, output_options
from loratool.cli.screen import Screen
from loratool.inspecting.estimate import EstimateOptions


@click.command()
@click.argument("base", type=OPERAND)
@click_options(EstimateOptions)
@output_options
def estimate(base: Path, options: EstimateOptions, screen: Screen) -> None:
    """Estimate the parameters, sizes and training memory of an adapter before training it.

    BASE is a model folder, a file or a Hub id (only headers are read), or the config.json of a decoder.

    \b
    Examples:
      loratool estimate ./Llama-3.2-1B --rank 8 --target q_proj,v_proj
      loratool estimate ./Llama-3.2-1B/config.json --rank 8 --rank 64 --target all-linear
    """
    from loratool.inspecting.estimate import estimate

    screen.show(estimate(base, options))
