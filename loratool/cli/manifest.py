"""`loratool run`: in a module that is not called so, which would hide the function `run` of this package."""

import click

from loratool.cli.options import PATH, library_command
from loratool.commands.run import run as function
from loratool.lineage.running import ManifestOptions

run = library_command(
    function,
    ManifestOptions,
    click.argument("manifest", type=PATH, metavar="FILE"),
    help="""Run the steps of a manifest whose outputs are not up to date.

    FILE is YAML, or - for stdin: a list of `steps`, each a command with the keywords of the library. Paths start from
    the folder of FILE; with -, from the working folder. A step runs again only if its options, the digests of its inputs or its output have changed; after an
    interruption, run the same command again to continue.

    \b
    Examples:
      loratool run ./models.yaml --dry-run
      loratool run ./models.yaml
    """,
)
