"""`loratool push`."""

import click

from loratool.cli.operands import Place
from loratool.cli.options import PUSHING, library_command
from loratool.commands.push import push as function
from loratool.publishing.options import PushOptions

push = library_command(
    function,
    PushOptions,
    click.argument("path", type=Place("folder")),
    click.argument("repo", type=Place("repository")),
    help="""Upload a finished model or adapter to the Hub, then verify the uploaded files.

    REPO is org/name; it is created if missing: private, unless --public is given. Only the files of the model or
    adapter are uploaded, and only those that REPO lacks. The token comes from `hf auth login` or HF_TOKEN.

    \b
    Examples:
      loratool push ./my-adapter me/my-adapter --dry-run
      loratool push ./my-adapter me/my-adapter --public
      loratool push ./merged me/merged --revision v2 --message "Second try"
      loratool push s3://models/merged me/merged
    """,
    progress=PUSHING,
)
