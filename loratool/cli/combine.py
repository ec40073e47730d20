"""`loratool combine`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OPERAND, OUT, click_options, output_options
from loratool.cli.screen import Screen
from loratool.commands.combine import CombineAndPushOptions
from loratool.commands.publish import with_push


@click.command()
@click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER...")
@OUT
@click_options(CombineAndPushOptions)
@output_options
def combine(adapters: tuple[Path, ...], out: Path, options: CombineAndPushOptions, screen: Screen) -> None:
    """Combine several adapters of one base into one.

    METHOD is linear (exact: ranks add up), cat, svd, slerp, nuslerp, karcher, model_stock, ties, dare_linear,
    dare_ties, della, breadcrumbs, sce, magnitude_prune, tsv, iso_c, iso_cts, or one of PEFT's methods on factors:
    linear-factors, ties-factors, dare_linear-factors, dare_ties-factors, magnitude_prune-factors.

    \b
    Examples:
      loratool combine ./style ./facts -o ./both -w 0.7 -w 1.2
      loratool combine ./a ./b ./c -o ./small --rank 32
      loratool combine ./a ./b ./c -o ./ties --method ties --density 0.3 --space core
    """
    from loratool.reworking.combine import combine

    with screen.layers("combining") as progress, screen.bytes("pushing") as push_progress:
        report = with_push(combine, (adapters, out), options, progress, push_progress)
    screen.show(report)
