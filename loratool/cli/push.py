"""`loratool push`."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli.options import PATH, click_options, output_options
from loratool.cli.screen import Screen
from loratool.publishing.options import PushOptions


@click.command()
@click.argument("path", type=PATH)
@click.argument("repo")
@click_options(PushOptions)
@output_options
def push(path: Path, repo: str, options: PushOptions, screen: Screen) -> None:
    """Upload a finished model or adapter to the Hub, then verify the uploaded files.

    REPO is org/name; it is created if missing: private, unless --public is given. Only the files of the model or
    adapter are uploaded, and only those that REPO lacks. The token comes from `hf auth login` or HF_TOKEN.

    \b
    Examples:
      loratool push ./my-adapter me/my-adapter --dry-run
      loratool push ./my-adapter me/my-adapter --public
      loratool push ./merged me/merged --revision v2 --message 'Second try'
    """
    from loratool.publishing.pushing import push

    with screen.bytes("pushing") as progress:
        report = push(path, repo, options, progress)
    screen.show(report)
