"""`loratool reproduce`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loratool.cli.options import MAKING, OUT, PATH, Bar, library_command
from loratool.commands.reproduce import reproduce as function
from loratool.errors import LoratoolError
from loratool.lineage.reproducing import ReproduceOptions, command_of


def bar_of(words: Mapping[str, Any]) -> Bar:
    """That of the command that is repeated. What has no record that can be read is refused by the function."""
    try:
        return MAKING.get(command_of(Path(words["made"])), MAKING["merge"])
    except LoratoolError:
        return MAKING["merge"]


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
    progress=bar_of,
)
