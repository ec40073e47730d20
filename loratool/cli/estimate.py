"""`loratool estimate`."""

import click

from loratool.cli.options import A_MODEL, library_command
from loratool.commands.estimate import estimate as function
from loratool.inspecting.estimate import EstimateOptions

estimate = library_command(
    function,
    EstimateOptions,
    click.argument("base", type=A_MODEL, required=False),
    help="""Estimate the parameters, sizes and training memory of an adapter before training it.

    BASE is a model folder, a file or a Hub id (only headers are read), or the config.json of a decoder. With
    --preset, the sizes of a widely used model are taken from a table instead, and nothing is read or downloaded.

    \b
    Examples:
      loratool estimate --preset llama-2-7b --rank 8 --target q_proj,v_proj
      loratool estimate ./Llama-3.2-1B --rank 8 --target q_proj,v_proj
      loratool estimate ./Llama-3.2-1B/config.json --rank 8 --rank 64 --target all-linear
      loratool estimate --preset llama-2-7b --rank 8 --target q_proj,v_proj --html estimate.html
    """,
    pictures=True,
)
