"""`loratool push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import PATH, click_options, output_options
from loratool.publishing.pushing import PushOptions

if TYPE_CHECKING:
    from pathlib import Path

    from loratool.cli.screen import Screen


@click.command()
@click.argument("path", type=PATH)
@click.argument("repo")
@click_options(PushOptions)
@output_options
def push(path: Path, repo: str, options: PushOptions, screen: Screen) -> None:
    """Upload a finished model or adapter to the Hub, and check what is there afterwards.

    REPO is org/name; it is made where it is missing, private unless --public. Only what a model or an adapter is made of
    is sent, and of that only what REPO has not. The token is that of `hf auth login` or of HF_TOKEN.

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
