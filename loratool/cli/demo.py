"""`loratool demo`."""

from dataclasses import dataclass
from pathlib import Path

import click

from loratool.cli.options import PATH, library_command
from loratool.demo import demo as function
from loratool.options.described import FLAG, Options, option


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Of `demo`."""

    overwrite: bool = option(help="Replace the output of an earlier demo in DIR.", default=False, kind=FLAG)


demo = library_command(
    function,
    DemoOptions,
    click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]"),
    help="""Build a small base and an adapter, merge them, and check the result against the formula.

    \b
    Example: loratool demo ./loratool-demo
    """,
)
