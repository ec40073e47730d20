"""`loratool compare`."""

import click

from loratool.cli.options import LAYERS, OPERAND, library_command
from loratool.commands.compare import compare as function
from loratool.reworking.compare import CompareOptions

compare = library_command(
    function,
    CompareOptions,
    click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="ADAPTER ADAPTER..."),
    help="""Measure how similar adapters are and how much they interfere.

    \b
    Example: loratool compare ./style ./facts
    """,
    progress=("comparing", LAYERS),
)
