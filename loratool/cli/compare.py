"""`loratool compare`."""

import click

from loratool.cli.options import AN_ADAPTER, LAYERS, library_command
from loratool.commands.compare import compare as function
from loratool.reworking.compare import CompareOptions

compare = library_command(
    function,
    CompareOptions,
    click.argument("adapters", type=AN_ADAPTER, nargs=-1, required=True, metavar="ADAPTER ADAPTER..."),
    help="""Measure how similar adapters are and how much they interfere.

    \b
    Example: loratool compare ./style ./facts
    """,
    pictures=True,
    progress=("comparing", LAYERS),
)
