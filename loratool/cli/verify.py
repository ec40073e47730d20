"""`loratool verify`."""

import click

from loratool.cli.options import A_MODEL, AN_ADAPTER, BYTES, library_command
from loratool.commands.verify import verify as function
from loratool.verifying.options import VerifyOptions

verify = library_command(
    function,
    VerifyOptions,
    click.argument("merged", type=A_MODEL),
    click.option(
        "--base",
        type=A_MODEL,
        metavar="BASE",
        help="The model that MERGED was made of [default: the adapter names it].",
    ),
    click.option(
        "--adapter",
        "adapters",
        type=AN_ADAPTER,
        multiple=True,
        metavar="ADAPTER",
        help="An adapter that was merged into it; may be repeated.",
    ),
    help="""Verify a merged model, whichever tool made it, and explain what is wrong.

    With MERGED alone, every file is compared with its loratool.json. With BASE and ADAPTER, every tensor is compared
    with the formula, in ulp; nothing is written. Exit code 0 means proven, 5 that the model differs.

    \b
    Examples:
      loratool verify ./merged
      loratool verify ./merged --base ./Llama-3.2-1B --adapter ./my-adapter
      loratool verify ./merged --base ./base --adapter ./my-adapter --html verified.html
      loratool verify me/merged --adapter ./style -w 0.7 --adapter ./facts -w 1.2
    """,
    pictures=True,
    shared=True,
    judged="merged",
    progress=("verifying", BYTES),
)
