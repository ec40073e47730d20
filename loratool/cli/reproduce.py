"""`loratool reproduce`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import OUT, PATH, click_options, output_options
from loratool.cli.screen import Screen, end_with
from loratool.lineage.reproducing import ReproduceOptions


@click.command()
@click.argument("made", type=PATH)
@OUT
@click_options(ReproduceOptions)
@output_options
def reproduce(made: Path, out: Path, options: ReproduceOptions, screen: Screen) -> None:
    """Repeat the run that made an output, and compare all bytes.

    MADE is what loratool made. Its inputs are looked for by name in this folder and next to MADE, on the Hub, and by
    their digests in each FOLDER of --from; those with other digests than loratool.json has are refused. Exit code 0
    means that all bytes are the same, 5 that some differ.

    \b
    Examples:
      loratool reproduce ./merged -o ./again
      loratool reproduce ./merged -o ./again --from /data/models --from /data/adapters
    """
    from loratool.commands.makers import MAKERS
    from loratool.lineage.reproducing import reproduce

    result = reproduce(made, out, options, MAKERS)
    screen.show(result)
    end_with(made, result)
