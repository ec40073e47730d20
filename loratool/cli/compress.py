"""`loratool compress`."""

import click

from loratool.cli.operands import Output
from loratool.cli.options import MAKING, OPERAND, PATH, library_command
from loratool.commands.compress import compress as function
from loratool.reworking.compressing.options import CompressOptions

compress = library_command(
    function,
    CompressOptions,
    click.argument("adapters", type=OPERAND, nargs=-1, required=True, metavar="DIR|ADAPTER..."),
    click.option("-o", "--output", "out", type=PATH, cls=Output, metavar="OUT", help="Output folder."),
    help="""Compress many adapters of one base by sharing directions in each module.

    DIR is a folder of adapters. OUT gets shared.safetensors and a small file for each adapter, from which `loratool
    expand` makes an ordinary adapter. Where sharing does not pay, adapters are truncated instead.

    \b
    Examples:
      loratool compress ./adapters -o ./fleet --budget 16MB
      loratool compress ./adapters -o ./fleet --energy 0.95
      loratool compress ./one-more --into ./fleet
    """,
    progress=MAKING["compress"],
)
