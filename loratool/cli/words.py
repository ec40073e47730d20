"""What commands have in common: kinds of words, the options of every output, progress and the printing of reports."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from loratool.errors import escaped, printable
from loratool.reading import EXPERT_LAYOUTS

Value = TypeVar("Value")
Command = TypeVar("Command", bound=Callable[..., None])
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
MAPS = click.option(
    "--map",
    "maps",
    multiple=True,
    metavar="REGEX=TEMPLATE",
    help="Another name for the adapters' weights in which REGEX is found, as in re.sub; may be repeated.",
)
ORIENTATION = click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Whether square weights of layers that may be Conv1D are stored (in, out) [default: the class decides].",
)
PUSH = "loratool.push"  # in a context's meta: what pushes the output
PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the library says better


class Operand(click.Path):
    """A path, or a place on the Hub. What begins with `./` is a path, which a relative `Path` does not show any more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.startswith("./") and not os.path.lexists(value):
            value = os.path.abspath(value)
        return super().convert(value, param, ctx)


OPERAND = Operand(path_type=Path, readable=False)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", str(value).strip().lower())
        if not match or match[2] not in UNITS:
            self.fail(f"{printable(repr(value))} is not a size; write it like 5GB, 512MiB or 1000000", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


def reading_options(command: Command) -> Command:
    """What the caller says of adapters where their files do not: for all of them, or once per adapter."""
    for option in (
        click.option(
            "--input-alpha",
            type=float,
            multiple=True,
            metavar="FLOAT",
            help="α of an adapter whose files do not hold it; once for all, or once per adapter in order.",
        ),
        click.option(
            "--adapter-name",
            multiple=True,
            metavar="NAME",
            help="Which adapter to read where one file or folder holds several; once for all, or once per adapter.",
        ),
        click.option(
            "--expert-layout",
            type=click.Choice(EXPERT_LAYOUTS),
            multiple=True,
            help="Order of the columns of a fused lora_B where the config does not say it; once for all, or once per adapter.",
        ),
    ):
        command = option(command)
    return command


def one(values: tuple[Value, ...], name: str) -> Value | None:
    """The value of an option that a command with one adapter takes at most once."""
    if len(values) > 1:
        raise click.UsageError(f"{name} is given {len(values)} times for one adapter")
    return values[0] if values else None


def silence_client(_ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    """Keep the Hub's client from showing bars of its own, which it decides when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


def output_options(command: Command) -> Command:
    """`--json`, `-q` and `-v`, which every command has."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show the traceback of a bug."),
        click.option(
            "-q", "--quiet", is_flag=True, callback=silence_client, help="No progress and no report, errors only."
        ),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr."),
    ):
        command = option(command)
    return command


def show(data: Any, text: Callable[[], str], as_json: bool, quiet: bool) -> None:
    """Print a report on stdout, as JSON or as text; push what was written first, where that is asked for."""
    from loratool.results import plain

    asked = click.get_current_context().meta.get(PUSH)
    pushed = asked(quiet) if asked else None
    if not quiet:
        for note in getattr(data, "notes", ()):
            if note.is_warning:
                click.echo(f"warning: {note}", err=True)
    if as_json:
        table = plain(data)
        click.echo(json.dumps(table if pushed is None else {**table, "pushed": plain(pushed)}, indent=2))
    elif not quiet:
        click.echo(escaped(text() if pushed is None else f"{text()}\n\n{pushed}", keep="\n"))


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A tqdm bar in bytes on stderr, or None where nobody is looking."""
    with bar(quiet, "merging", unit="B", unit_scale=True) as progress:
        yield progress


@contextmanager
def counter(quiet: bool, word: str) -> Iterator[Callable[[int, int], None] | None]:
    """A tqdm bar in layers on stderr, or None where nobody is looking."""
    with bar(quiet, word, unit=" layers") as progress:
        yield progress


@contextmanager
def bar(quiet: bool, word: str, **looks: Any) -> Iterator[Callable[[int, int], None] | None]:
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=word, file=sys.stderr, leave=False, **looks) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
