"""Click's side of options: operands, the options of a command from their dataclass, and those that every command has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from loratool.cli.operands import Output, Place
from loratool.cli.partial import PartialWords, is_shared, shared_work
from loratool.cli.pictures import Pictures
from loratool.cli.screen import VERBOSITY, Screen
from loratool.errors import UsageError, escaped, printable
from loratool.options.described import Flag, Option, Options, PlaceKind, described_by
from loratool.options.shared import PageOptions, PictureOptions

Command = Callable[..., None]
PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the library says better


OPERAND = Place()  # an adapter or a model
A_MODEL = Place("model")
AN_ADAPTER = Place("adapter")
BASE = click.argument("base", type=A_MODEL)
ADAPTER = click.argument("adapter", type=AN_ADAPTER)
ADAPTERS = click.argument("adapters", type=AN_ADAPTER, nargs=-1, required=True, metavar="ADAPTER...")
OUT = click.option(
    "-o",
    "--output",
    "out",
    type=PATH,
    cls=Output,
    required=True,
    metavar="OUT",
    help="Output folder, or a file for an adapter that is one file.",
)


LAYERS = {"unit": " layers"}  # how a bar counts
BYTES = {"unit": "B", "unit_scale": True}
UNITS = {"unit": " units"}
Bar = tuple[str, Mapping[str, Any]]  # the word before it, and what it counts
PUSHING: Bar = ("pushing", BYTES)
MAKING: Mapping[str, Bar] = {  # commands that make something
    "merge": ("merging", BYTES),
    "rescale": ("measuring", LAYERS),
    "resize": ("resizing", LAYERS),
    "combine": ("combining", LAYERS),
    "convert": ("converting", LAYERS),
    "extract": ("extracting", LAYERS),
    "compress": ("compressing", LAYERS),
    "expand": ("expanding", LAYERS),
    "rebase": ("comparing", LAYERS),
}


class LibraryCommand(click.Command):
    """A command that prints what one function of the library returns."""

    function: Callable[..., Any]


def library_command(
    function: Callable[..., Any],
    options: type[Options],
    *operands: Callable[[Command], Command],
    help: str,
    name: str = "",
    pictures: bool = False,
    shared: bool = False,
    judged: str = "",
    **bars: Bar | Callable[[Mapping[str, Any]], Bar],
) -> click.Command:
    """The command that calls a function of the library with its words, and shows the result.

    Args:
        function: it takes the operands and the fields of `options` by name.
        options: the dataclass that describes the options.
        operands: what is on the command line besides options, as Click's decorators.
        help: the text for `--help`.
        name: of the command, where it is not that of the function.
        pictures: whether the result has a page, which `--html` and `--svg` write.
        shared: whether several workers may share it, as `PartialWords` say.
        judged: the operand that the result is a verdict on; the command ends with its exit code.
        bars: keyword of the function that is called with progress → its bar, or what tells it from the command's words.
    """

    def run(as_json: bool, quiet: bool, pictures: Pictures | None = None, **words: Any) -> None:
        screen = Screen(as_json, quiet)
        chosen = PartialWords(**given({name: words.pop(name) for name in described_by(PartialWords) if shared}))
        work = shared_work(made.name or "", chosen, words) if is_shared(chosen) else function
        looking = {name: bar(words) if callable(bar) else bar for name, bar in bars.items() if screen.is_watched}
        if looking and chosen.part is not None:
            looking = {"progress": (f"{looking['progress'][0]} {chosen.part}", UNITS)}
        with ExitStack() as stack:
            shown = {name: stack.enter_context(screen.bar(word, **looks)) for name, (word, looks) in looking.items()}
            result = work(**given(words), **shown)
        screen.show(result)
        if pictures is not None and chosen.part is None:
            pictures.write(result)
        if judged and chosen.part is None and result.exit_code:
            subject = printable(words[judged])
            told = [f"Error: {subject}: {result.sentence}", *(f"  {each}" for each in result.failures if quiet)]
            click.echo("\n".join(map(escaped, told)), err=True)
            raise click.exceptions.Exit(result.exit_code)

    command = with_pictures(options)(output_options(run)) if pictures else output_options(run)
    more = (described_options(PartialWords),) if shared else ()
    for decorate in (*more, described_options(options), *reversed(operands)):
        command = decorate(command)
    made = click.command(name or function.__name__, cls=LibraryCommand, help=help)(command)
    made.function = function
    return made


def given(words: Mapping[str, Any]) -> dict[str, Any]:
    """The words that are there: Click has None, or no values, for the others."""
    return {name: value for name, value in words.items() if value not in (None, ())}


def click_options(options: type[Options]) -> Callable[[Command], Command]:
    """Give a command the options that a dataclass describes: as one object, `options`, and a `screen` to show things on.

    What the words mean is found out by the dataclass, as for the library.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(as_json: bool, quiet: bool, **words: Any) -> None:
            chosen = {name: words.pop(name) for name in described_by(options)}
            command(**words, options=options(**given(chosen)), screen=Screen(as_json, quiet))

        return described_options(options)(called)

    return decorate


def with_pictures(own: type[Options]) -> Callable[[Command], Command]:
    """Give a command `--html` and `--svg`, as one object, `pictures`; they are checked before the command is called.

    Args:
        own: the command's other options, whose `--overwrite` is for pictures too; without one, the command gets it.
    """
    described = PictureOptions if "overwrite" in described_by(own) else PageOptions

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(**words: Any) -> None:
            chosen = described(**given({name: words.pop(name) for name in described_by(described)}))
            own_overwrite = words.get("overwrite") or getattr(words.get("options"), "overwrite", False)
            overwrite = chosen.overwrite if isinstance(chosen, PageOptions) else bool(own_overwrite)
            html, svg = (None if path is None else Path(path) for path in (chosen.html, chosen.svg))
            pictures = Pictures(html, svg, overwrite, str(click.get_current_context().command.name))
            if (
                overwrite
                and not pictures
                and words.get("out") is None
                and not getattr(words.get("options"), "stream", False)
            ):
                ways = "-o, --html or --svg" if "out" in words else "--html or --svg"
                raise UsageError(f"--overwrite needs {ways}; nothing else is written")
            pictures.check(words.get("out"))
            command(**words, pictures=pictures)

        return described_options(described)(called)

    return decorate


def described_options(options: type[Options]) -> Callable[[Command], Command]:
    """Give a command Click's options for the fields of a dataclass."""

    def decorate(command: Command) -> Command:
        for name, (described, default) in reversed(described_by(options).items()):
            command = click_option(name, described, default)(command)
        return command

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
        type=Place(described.kind.role) if isinstance(described.kind, PlaceKind) else click.UNPROCESSED,
        multiple=described.many,
        required=described.required,
        metavar=described.metavar or described.kind.metavar,
        help=help,
        shell_complete=partial(words_for, described) if described.values is not None else None,
    )


def words_for(described: Option, context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The values of an option that begin as what is typed; of a comma list the last one is completed."""
    before, comma, begun = incomplete.rpartition(",") if described.commas else ("", "", incomplete)
    assert described.values is not None
    # Click has not given the words before an option without a value to the operands yet
    names = [str(each.name) for each in context.command.params if isinstance(each, click.Argument)]
    operands = {**dict(zip(names, context.args, strict=False)), **given(context.params)}
    return [f"{before}{comma}{word}" for word in described.values(operands) if word.startswith(begun)]


def silence_client(_ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    """Keep the Hub's client from showing bars of its own, which it decides when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


def note_verbosity(ctx: click.Context, _param: click.Parameter, count: int) -> None:
    """Keep how often `-v` was given, which no command's function has to know."""
    ctx.meta[VERBOSITY] = count


def output_options(command: Command) -> Command:
    """`--json`, `-q` and `-v`, which every command has."""
    for option in (
        click.option(
            "-v",
            "--verbose",
            count=True,
            callback=note_verbosity,
            expose_value=False,
            help="Show tracebacks of bugs, and which features this system lacks; -vv also where a merge spends its time.",
        ),
        click.option("-q", "--quiet", is_flag=True, callback=silence_client, help="Print errors only."),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object to stdout and everything else to stderr."
        ),
    ):
        command = option(command)
    return command
