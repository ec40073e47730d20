"""The operands of a command: as they were typed, as they are meant, and what to type next where that was wrong."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli.screen import NOTES
from loratool.errors import ANOTHER_OUT, LoratoolError, UsageError, escaped, printable
from loratool.files.hub_names import parse, slashed
from loratool.files.names import at_home
from loratool.files.system import shell_word
from loratool.grouping import by_key
from loratool.stores.names import is_in_store, parse_store

if TYPE_CHECKING:
    from loratool.fetching.operands import Operand, Role
    from loratool.notes import Note

OPERANDS = "loratool.operands"  # key of a context's `meta`: the operands as they are meant
# What an output is called that was not named, from the names of the operands.
NAMES = {
    "merge": "{base}-{adapters}",
    "rescale": "{adapter}-rescaled",
    "resize": "{adapter}-resized",
    "combine": "{adapters}",
    "convert": "{adapter}-{dialect}{server}",
    "extract": "{tuned}-adapter",
    "reproduce": "again",
    "index": "{paths}.index",
    "compress": "{adapters}-compressed",
    "expand": "{name}",
    "rebase": "{adapter}-rebased",
}
EMPTY = "it is empty; is a shell variable unset?"
MERGED = re.compile(rb'\{\s*"made_by": "loratool merge"')  # how the record of a merge begins
MOST_NAMED = 3  # operands that such a name is made of


class Place(click.Path):
    """A path, or a place on the Hub. What begins with `./` is a path, which a relative `Path` does not show any more."""

    def __init__(self, role: Role = "any", given: str = "", then: Role = "any") -> None:
        """A place that is read as `role`; as `then` where the parameter `given` has a value."""
        super().__init__(path_type=Path, readable=False)
        self.role: Role = role
        self.given, self.then = given, then

    def role_in(self, words: Mapping[str, Any]) -> Role:
        return self.then if words.get(self.given) is not None else self.role

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_in_store(value):
            parse_store(value)  # before a Path takes slashes away
        if value == "":
            self.fail(EMPTY, param, ctx)
        if isinstance(value, str) and value.startswith(("./", f".{os.sep}")) and not os.path.lexists(value):
            value = os.path.abspath(value)
        return super().convert(value, param, ctx)


class UnlessGiven(click.Argument):
    """An operand that the command needs no more if a flag is given."""

    def __init__(self, *names: Any, flag: str, **words: Any) -> None:
        super().__init__(*names, **words)
        self.flag = flag  # the name of its parameter; Click has read all options by then

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            if ctx.params.get(self.flag):
                return None
            raise


class Output(click.Option):
    """`-o`, without which a name and the whole command are proposed."""

    def value_is_missing(self, value: Any) -> bool:  # noqa: ARG002
        """Never, for Click: what is missing is said with the operands in hand."""
        return False

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """The path, `~` expanded: not every shell does it."""
        if value == "":
            raise click.BadParameter(EMPTY, ctx, self)
        found = super().process_value(ctx, value)
        return at_home(found) if isinstance(found, Path) else found


def forgiving(command: click.Command) -> click.Command:
    """The same command, called with its operands as they are meant; its errors end with the next command to type."""
    run = command.callback
    assert run is not None

    @wraps(run)
    def called(**words: Any) -> Any:
        context = click.get_current_context()
        try:
            read_operands(context, words)
            check_output(context, words)
            return run(**words)
        except LoratoolError as error:
            from loratool.fetching.next_steps import next_step

            if error.own_hint == ANOTHER_OUT:
                error.hint = f"-o {shell_word(free_name(context))}"
            error.hint = next_step(error, context.find_root().obj or (), meant_in(context))
            raise

    command.callback = called
    return command


def complain_of(error: LoratoolError, out: str | None = None, adapters: Sequence[Path] = ()) -> None:
    """Say on stderr what went wrong with one of several paths, or outputs with adapters of their own; it goes on."""
    from loratool.fetching.next_steps import alone, next_step
    from loratool.fetching.operands import Operand

    context = click.get_current_context()
    operands, arguments = meant_in(context), context.find_root().obj or ()
    if out is not None:
        first = [each.word for each in operands if each.role == "adapter"]
        arguments = alone(arguments, out, [*map(str, adapters)], first)
        operands = [
            *(each for each in operands if each.role == "model"),
            *(Operand(str(each), "adapter") for each in adapters),
        ]
    if error.own_hint == ANOTHER_OUT:  # which of several it is, `-o` does not say
        error.hint = f"loratool {context.info_name} --help"
    error.hint = next_step(error, arguments, operands)
    whose = "" if out is None or error.about == out else f"{printable(out)}: "  # an error about it names it
    click.echo(escaped(f"Error: {whose}{error}\nhint: {error.hint}", keep="\n"), err=True)


def read_adapters(words: Sequence[str], quiet: bool) -> list[Path]:
    """Adapters that an option names, as they are meant; what was typed otherwise is said unless `quiet`."""
    from loratool.fetching.operands import Operand, understood

    meant, notes = understood(
        [Operand(slashed(Place("adapter").convert(word, None, None)), "adapter") for word in words]
    )
    context = click.get_current_context()
    context.meta[NOTES] = [*context.meta.get(NOTES, ()), *notes]
    say(notes, quiet)
    return [Path(each.word) for each in meant]


def say(notes: Sequence[Note], quiet: bool) -> None:
    """Tell on stderr which operands were not read as they were typed."""
    for note in () if quiet else notes:
        click.echo(escaped(f"note: {note}"), err=True)


def read_operands(context: click.Context, words: dict[str, Any]) -> None:
    """Put the operands of a command into its words as they are meant; what was typed otherwise is said."""
    given = [*places_given(context.command, words)]
    context.meta[OPERANDS], context.meta[NOTES] = [], []
    if all(place.role_in(words) == "model" and all(map(is_merged, values)) for _, place, values in given):
        context.meta[OPERANDS] = None  # which an index of formats adds nothing to
        return
    from loratool.fetching.operands import understood

    typed = operands_of(context.command, words)
    meant, notes = understood(typed)
    context.meta[OPERANDS], context.meta[NOTES] = meant, notes
    for name, place, _ in given:
        found = [new.word for old, new in zip(typed, meant, strict=True) if old.parameter == name]
        own = found if place.role == "repository" else [*map(Path, found)]  # the name of a repository stays text
        words[name] = tuple(own) if isinstance(words[name], tuple) else own[0]
    say(notes, bool(words.get("quiet")))


def meant_in(context: click.Context) -> Sequence[Operand]:
    """The operands of a command as they are meant."""
    if context.meta[OPERANDS] is None:
        context.meta[OPERANDS] = operands_of(context.command, context.params)
    found: Sequence[Operand] = context.meta[OPERANDS]
    return found


def places_given(command: click.Command, words: Mapping[str, Any]) -> Iterator[tuple[str, Place, tuple[Any, ...]]]:
    """Name, type and values of each parameter that is an operand, or several, and was given."""
    for parameter in command.params:
        name, value = str(parameter.name), words.get(str(parameter.name))
        if isinstance(parameter.type, Place) and value not in (None, ()):
            yield name, parameter.type, value if isinstance(value, tuple) else (value,)


def is_merged(word: str) -> bool:
    """Whether an operand is a model that loratool merged, by its record: nothing else can be meant."""
    try:
        with open(os.path.join(word, "loratool.json"), "rb") as record:
            return MERGED.match(record.read(64)) is not None
    except (OSError, ValueError):
        return False


def operands_of(command: click.Command, words: Mapping[str, Any]) -> list[Operand]:
    """The operands as they were typed, in the order of the parameters; patterns that match something are expanded."""
    from loratool.fetching.operands import Operand, expanded

    found: list[Operand] = []
    for name, place, values in places_given(command, words):
        every = [slashed(each) for each in values]
        if place.role != "any" and (isinstance(words[name], tuple) or len(expanded(every[0])) == 1):
            every = [path for word in every for path in expanded(word)]  # of "any", a pattern means a table
        found += [Operand(word, place.role_in(words), name) for word in every]
    return found


def check_output(context: click.Context, words: dict[str, Any]) -> None:
    """Raise `UsageError` with a name for the output where the command needs one and has none."""
    for parameter in context.command.params:
        if isinstance(parameter, Output) and parameter.required and words.get(str(parameter.name)) is None:
            raise without_output(context)


def without_output(context: click.Context) -> UsageError:
    """The error for a command that has no OUT, with the whole command to type; the last word may have been meant as OUT."""
    from loratool.fetching.next_steps import same_path, typed

    sentence = "Missing option '-o' / '--output', so nothing was written"
    arguments: Sequence[str] = context.find_root().obj or ()
    *others, last = meant_in(context) or [None]  # type: ignore[list-item]  # and then there are no others
    if len([each for each in others if each.kind]) > 1 and not last.kind and same_path(arguments[-1], last.word):
        return UsageError(sentence, hint=typed(*arguments[:-1], "-o", arguments[-1]))
    return UsageError(sentence, hint=f"-o {shell_word(free_name(context))}")


def free_name(context: click.Context) -> str:
    """A name for the output of a command that is not there yet; a file where the base is one."""
    command, operands, words = str(context.info_name), meant_in(context), context.params
    stems = by_key((operand.parameter, stem_of(operand.word)) for operand in operands)
    parts = defaultdict(str, {name: "-".join(found[:MOST_NAMED]) for name, found in stems.items()})
    parts |= {
        name: str(words.get(key) or "").partition("@")[0]
        for name, key in (("dialect", "to"), ("server", "server"), ("name", "name"))
    }
    if command == "merge" and not parts["adapters"]:
        parts["adapters"] = "merged"
    name = NAMES.get(command, "").format_map(parts).strip("-") or f"{next(iter(parts.values()), '') or 'out'}-{command}"
    suffix = suffix_of_output(command, operands, words)
    found, number = f"./{name}{suffix}", 2
    while os.path.lexists(found):
        found, number = f"./{name}-{number}{suffix}", number + 1
    return found


def suffix_of_output(command: str, operands: Sequence[Operand], words: Mapping[str, Any]) -> str:
    """That of an output which is one file, as its base or its first adapter is; empty for a folder."""
    from loratool.adapters.formats import DIALECTS, format_at

    if command == "merge":
        base = next((operand.word for operand in operands if operand.parameter == "base"), "")
        return Path(base).suffix if os.path.isfile(base) else ""
    first = Path(operands[0].word) if operands else Path()
    if command not in ("rescale", "resize", "combine", "convert", "rebase") or not first.is_file():
        return ""
    dialect = words.get("to")
    try:
        form = DIALECTS[dialect].format if dialect in DIALECTS else format_at(first)
    except LoratoolError:
        return ""
    return Path(form.weights_name).suffix if form.dialects and not form.config_name else ""


def stem_of(word: str) -> str:
    """What an operand is called, for the name of a folder."""
    if not os.path.lexists(word):
        try:
            place, stored = parse(word), parse_store(word)
        except LoratoolError:
            place = stored = None
        word = place.repo if place else stored.name if stored else word
    path = Path(os.path.abspath(word))
    return path.stem if path.is_file() else path.name
