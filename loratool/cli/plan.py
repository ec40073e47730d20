"""`loratool plan`."""

import click

from loratool.cli.operands import Output
from loratool.cli.options import A_MODEL, AN_ADAPTER, PATH, library_command
from loratool.commands.plan import plan as function
from loratool.merging.dry_run import DryRunOptions

plan = library_command(
    function,
    DryRunOptions,
    click.argument("base", type=A_MODEL),
    click.argument("adapters", type=AN_ADAPTER, nargs=-1, metavar="ADAPTER..."),
    click.option(
        "-o", "--output", "out", type=PATH, cls=Output, metavar="OUT", help="Output of the merge, if already known."
    ),
    help="""Show what a merge would do, without doing it.

    The options are those of merge. Only headers of a BASE on the Hub are read. With --simulate, the plan also shows
    how long the merge takes with given numbers of workers (merge --part I/N), what limits it and what it moves.

    \b
    Examples:
      loratool plan ./Llama-3.2-1B ./my-adapter
      loratool plan org/large-model ./my-adapter --simulate 1,8,64
      loratool plan ./base ./my-adapter --simulate 16 --bandwidth 2.5GB --store-bandwidth 20GB
      loratool plan ./base ./my-adapter --html plan.html
    """,
    pictures=True,
)
