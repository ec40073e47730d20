"""`loratool run`: in a module that is not called so, which would hide the function `run` of this package."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.lineage.running import ManifestOptions


@click.command()
@click.argument("manifest", type=PATH, metavar="FILE")
@click_options(ManifestOptions)
@output_options
def run(manifest: Path, options: ManifestOptions, screen: Screen) -> None:
    """Do the steps of a manifest, as far as their outputs are not up to date.

    FILE is YAML: a list of `steps`, each a command with the keywords of the library. Paths start from the folder of
    FILE. A step is done again only if its options, the digests of its inputs or its output have changed; after an
    interruption, run the same command again to continue.

    \b
    Examples:
      loratool run ./models.yaml --dry-run
      loratool run ./models.yaml
    """
    from loratool.commands.makers import MAKERS
    from loratool.lineage.running import run

    screen.show(run(manifest, options, MAKERS))
