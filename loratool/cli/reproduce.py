"""`loratool reproduce`."""

import click

from loratool.cli.options import OUT, PATH, library_command
from loratool.commands.reproduce import reproduce as function
from loratool.lineage.reproducing import ReproduceOptions

reproduce = library_command(
    function,
    ReproduceOptions,
    click.argument("made", type=PATH),
    OUT,
    help="""Repeat the run that made an output, and compare all bytes.

    MADE is an output of loratool. Its inputs are looked for by name in this folder and next to MADE, on the Hub, and by
    their digests in each FOLDER of --from; inputs whose digests differ from loratool.json are refused. Exit code 0
    means that all bytes are the same, 5 that some differ.

    \b
    Examples:
      loratool reproduce ./merged -o ./again
      loratool reproduce ./merged -o ./again --from /data/models --from /data/adapters
    """,
    judged="made",
)
