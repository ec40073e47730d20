"""`loratool extract`."""

import click

from loratool.cli.options import A_MODEL, BASE, MAKING, OUT, PUSHING, library_command
from loratool.commands.extract import extract as function
from loratool.reworking.extracting.options import ExtractOptions

extract = library_command(
    function,
    ExtractOptions,
    BASE,
    click.argument("tuned", type=A_MODEL),
    OUT,
    help="""Extract an adapter from a full fine-tune: the difference TUNED − BASE, as closely as the ranks allow.

    \b
    Examples:
      loratool extract ./base ./fine-tuned -o ./adapter
      loratool extract ./base ./fine-tuned -o ./adapter --rank 64 --exclude embed
    """,
    pictures=True,
    shared=True,
    progress=MAKING["extract"],
    push_progress=PUSHING,
)
