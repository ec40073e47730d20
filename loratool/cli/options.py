"""Click's side of options: operands, the options of a command from their dataclass, and those that every command has."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from loratool.cli.screen import Screen
from loratool.options.described import Flag, Option, Options, described_by

Command = Callable[..., None]
PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the library says better


class Operand(click.Path):
    """A path, or a place on the Hub. What begins with `./` is a path, which a relative `Path` does not show any more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith(("./", f".{os.sep}")) and not os.path.lexists(value):
            value = os.path.abspath(value)
        return super().convert(value, param, ctx)


OPERAND = Operand(path_type=Path, readable=False)
OUT = click.option("-o", "--output", "out", type=PATH, required=True, metavar="OUT", help="Output folder.")


def click_options(options: type[Options]) -> Callable[[Command], Command]:
    """Give a command the options that a dataclass describes: as one object, `options`, and a `screen` to show things on.

    What the words mean is found out by the dataclass, as for the library.
    """
    every = described_by(options)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(**words: Any) -> None:
            given = {name: words.pop(name) for name in every}
            screen = Screen(as_json=words.pop("as_json"), quiet=words.pop("quiet"))
            command(**words, options=options(**{n: v for n, v in given.items() if v not in (None, ())}), screen=screen)

        decorated: Command = called
        for name, (described, default) in reversed(every.items()):
            decorated = click_option(name, described, default)(decorated)
        return decorated

    return decorate


def click_option(name: str, described: Option, default: Any) -> Callable[[Command], Command]:
    """One option, as Click has it. Its value is the word that was given, or None."""
    if isinstance(described.kind, Flag):
        return click.option(*described.flags, name, is_flag=True, default=None, help=described.help)
    shown = default if default not in (None, ()) else ""
    help = f"{described.help.removesuffix('.')} [default: {shown}]." if shown != "" else described.help
    return click.option(
        *described.flags,
        name,
        type=click.UNPROCESSED,
        multiple=described.many,
        required=described.required,
        metavar=described.metavar or described.kind.metavar,
        help=help,
    )


def silence_client(_ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    """Keep the Hub's client from showing bars of its own, which it decides when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


def output_options(command: Command) -> Command:
    """`--json`, `-q` and `-v`, which every command has."""
    for option in (
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            expose_value=False,
            help="Show tracebacks of bugs, and which features this system lacks.",
        ),
        click.option("-q", "--quiet", is_flag=True, callback=silence_client, help="Print errors only."),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object to stdout and everything else to stderr."
        ),
    ):
        command = option(command)
    return command
