"""`loratool push`, and `--push-to-hub` of the commands that write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loratool.cli.words import PATH, PUSH, bar, output_options, show

Command = TypeVar("Command", bound=Callable[..., None])
REPO = "loratool.repo"


def pushing_options(command: Command) -> Command:
    """`--push-to-hub` and `--public`; `show` pushes before it prints."""

    def keep(ctx: click.Context, _param: click.Parameter, repo: str | None) -> None:
        if repo is not None and not ctx.resilient_parsing:
            ctx.meta[REPO] = repo
            ctx.meta[PUSH] = lambda quiet: push_output(ctx, repo, quiet)

    def keep_public(ctx: click.Context, _param: click.Parameter, public: bool) -> None:
        ctx.meta[f"{REPO}.public"] = public

    def keep_allowed(ctx: click.Context, _param: click.Parameter, patterns: tuple[str, ...]) -> None:
        ctx.meta[f"{REPO}.allow-secret"] = patterns

    for option in (
        click.option(
            "--allow-secret",
            multiple=True,
            metavar="FILE",
            expose_value=False,
            callback=keep_allowed,
            help="With --push-to-hub: FILE holds no secret although it looks so; may be repeated.",
        ),
        click.option(
            "--public",
            is_flag=True,
            expose_value=False,
            callback=keep_public,
            help="Let everybody see a repository that --push-to-hub makes.",
        ),
        click.option(
            "--push-to-hub",
            metavar="REPO",
            expose_value=False,
            callback=keep,
            help="Upload the output as well, as `loratool push` does.",
        ),
    ):
        command = option(command)
    return command


def asked_repo() -> tuple[str | None, bool]:
    """The repository of `--push-to-hub`, and whether `--public` is given."""
    meta = click.get_current_context().meta
    return meta.get(REPO), bool(meta.get(f"{REPO}.public"))


def keep_excluded(ctx: click.Context, _param: click.Parameter, patterns: tuple[str, ...]) -> None:
    """Of an option `--exclude` that is for what is pushed."""
    ctx.meta[f"{REPO}.exclude"] = patterns


def selecting() -> dict[str, Any]:
    """The files that are left out, or may look as if they held a secret, as `push` and `stream` take them."""
    meta = click.get_current_context().meta
    return {"exclude": meta.get(f"{REPO}.exclude", ()), "allow_secret": meta.get(f"{REPO}.allow-secret", ())}


def check_access() -> None:
    """Find out that a push is possible, where one is asked for, before the work for it is done."""
    repo, public = asked_repo()
    if repo is None:
        given = {"--public": public, **{f"--{name.replace('_', '-')}": some for name, some in selecting().items()}}
        if idle := [option for option, value in given.items() if value]:
            raise click.UsageError(f"{', '.join(idle)}: only with --push-to-hub REPO, which is missing")
    elif not click.get_current_context().params.get("dry_run"):
        from loratool.hub.committing import full_name

        full_name(repo)


def push_output(ctx: click.Context, repo: str, quiet: bool) -> Any:
    """Push what a command wrote; None after a dry run."""
    from loratool.errors import LoratoolError, printable
    from loratool.hub import push

    out = ctx.params["out"]
    if ctx.params.get("dry_run"):
        return None
    goes_on = f"{printable(out)} is complete; `loratool push {printable(out)} {printable(repo)}` goes on"
    try:
        with bar(quiet, "pushing", unit="B", unit_scale=True) as progress:
            return push(out, repo, public=bool(ctx.meta.get(f"{REPO}.public")), **selecting(), progress=progress)
    except LoratoolError as error:
        raise type(error)(f"{error.message} ({goes_on})", error.problems) from None
    except KeyboardInterrupt as error:
        error.args = (goes_on,)
        raise


@click.command()
@click.argument("path", type=PATH)
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made where it is missing [default: main].")
@click.option("--create-pr", is_flag=True, help="Propose the commit as a pull request.")
@click.option("-m", "--message", help="Message of the commit.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Send these files too; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these files out; may be repeated.")
@click.option(
    "--allow-secret",
    multiple=True,
    metavar="FILE",
    help="FILE, or files of a pattern, holds no secret although it looks so; may be repeated.",
)
@click.option("--card", is_flag=True, help="Send a README.md made from loratool.json though there is one.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent and what is left out; ask nobody.")
@output_options
def push(
    path: Path,
    repo: str,
    public: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    allow_secret: tuple[str, ...],
    card: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Upload a finished model or adapter to the Hub, and check what is there afterwards.

    REPO is org/name; it is made where it is missing, private unless --public. Only what a model or an adapter is made of
    is sent, and of that only what REPO has not. The token is that of `hf auth login` or of HF_TOKEN.

    \b
    Examples:
      loratool push ./my-adapter me/my-adapter --dry-run
      loratool push ./my-adapter me/my-adapter --public
      loratool push ./merged me/merged --revision v2 --message 'Second try'
    """
    from loratool.hub import push

    with bar(quiet, "pushing", unit="B", unit_scale=True) as progress:
        report = push(
            path,
            repo,
            public=public,
            revision=revision,
            create_pr=create_pr,
            message=message,
            include=include,
            exclude=exclude,
            allow_secret=allow_secret,
            card=card,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)
