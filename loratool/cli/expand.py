"""`loratool expand`."""

import click

from loratool.cli.options import MAKING, OPERAND, OUT, PUSHING, library_command
from loratool.commands.expand import expand as function
from loratool.reworking.compressing.options import ExpandOptions

expand = library_command(
    function,
    ExpandOptions,
    click.argument("shared", type=OPERAND, metavar="FLEET"),
    click.argument("name", metavar="NAME"),
    OUT,
    help="""Write one of the adapters that `loratool compress` put into FLEET as an ordinary adapter.

    \b
    Example: loratool expand ./fleet style -o ./style
    """,
    progress=MAKING["expand"],
    push_progress=PUSHING,
)
