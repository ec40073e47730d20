"""What the functions of the library have in common: their options as keywords, and the next command in their errors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loratool.errors import InputError, LoratoolError, UsageError, printable
from loratool.options.described import Option, Options, PathKind, described_by, keyword_options

if TYPE_CHECKING:
    from loratool.arguments import PathLike
    from loratool.fetching.operands import Operand, Role

Function = TypeVar("Function", bound=Callable[..., Any])
# What an argument is read as, by its name; of any other, what it is named after.
ROLES: Mapping[str, Role] = {
    "base": "model",
    "tuned": "model",
    "merged": "model",
    "adapter": "adapter",
    "adapters": "adapter",
}


# Functions whose output is not `out`: the argument that is, and the words before it.
OUTPUTS = {"reproduce": ("again", ["-o"]), "record": ("", []), "stream": ("repo", ["--stream", "--push-to-hub"])}


def library_function(options: type[Options], command: str = "") -> Callable[[Function], Function]:
    """For a function of the library that takes the options of a command as keywords; see `with_next_step`."""
    return lambda function: keyword_options(options)(with_next_step(options, command)(function))


def with_next_step(options: type[Options], command: str = "") -> Callable[[Function], Function]:
    """For a function that does what a command does, of its own name unless another is given.

    An error that leaves it has the command to type next, as it has on the command line.
    """

    def made(function: Function) -> Function:
        signature = inspect.signature(function)
        name = function.__name__

        @wraps(function)
        def called(*positional: Any, **keywords: Any) -> Any:
            try:
                check_paths(signature, positional, keywords)
                return function(*positional, **keywords)
            except LoratoolError as error:
                with suppress(Exception):  # whatever the arguments are, it is this error that is told
                    bound = dict(signature.bind_partial(*positional, **keywords).arguments)
                    given = {**bound, **bound.pop("keywords", {})}
                    output, words = OUTPUTS.get(name, ("out", ["-o"]))
                    out = [*words, os.fspath(given.pop(output))] if given.get(output) is not None else []
                    error.next_step = step_after(error, command or name, options, given, out)
                raise

        return cast("Function", called)

    return made


@contextmanager
def operands_first(operands: PathLike | Sequence[PathLike]) -> Iterator[None]:
    """Let an operand that is missing be named before what is wrong with a file that an option names."""
    try:
        yield
    except InputError:
        from loratool.fetching import check_there

        check_there(*([operands] if isinstance(operands, (str, os.PathLike)) else operands))
        raise


def check_paths(signature: inspect.Signature, positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Raise `UsageError` for an argument that is annotated as a path, or as several, and is none.

    A mapping from adapters to weights would else be read as the adapters alone, and a text as a list of its letters.
    """
    with suppress(TypeError):  # for the function itself, which says what is missing or too much
        for name, value in signature.bind(*positional, **keywords).arguments.items():
            annotation = str(signature.parameters[name].annotation)
            if "PathLike" in annotation:
                check_path(name, value, annotation.split(" | "))


def check_path(name: str, value: Any, kinds: Sequence[str]) -> None:
    """Raise `UsageError` unless a value is a path, several or None, as far as the annotation has these."""
    if value is None and "None" in kinds:
        return
    many, one = "Sequence[PathLike]" in kinds, "PathLike" in kinds
    parts = value if many and isinstance(value, Sequence) and not isinstance(value, str) else [value] if one else None
    if parts is not None and all(isinstance(each, (str, os.PathLike)) for each in parts):
        if not all(map(os.fspath, parts)):
            raise UsageError(f"{name}: a path is empty")
        return
    expected = " or ".join(["a path"] * one + ["a list of paths"] * many)
    apart = "; weights are a list of their own, weights=[…]" if holds_weights(value) else ""
    raise UsageError(f"{name} must be {expected} (got {printable(repr(value))}){apart}")


def holds_weights(value: Any) -> bool:
    """Whether adapters were given with numbers, as a mapping or as pairs."""
    pairs = value.items() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(each, tuple) and any(isinstance(part, (int, float)) for part in each) for each in pairs)


def step_after(
    error: LoratoolError, command: str, options: type[Options], given: Mapping[str, Any], out: list[str]
) -> str:
    """The next command after an error of a command that was given these operands and options."""
    from loratool.fetching.next_steps import next_step

    known = described_by(options)
    operands = [each for name, value in given.items() if name not in known for each in operands_in(name, value)]
    words = [word for name, value in given.items() if name in known for word in option_words(*known[name], value)]
    return next_step(error, [command, *(operand.word for operand in operands), *words, *out], operands)


def operands_in(name: str, value: Any) -> Iterator[Operand]:
    """The paths and names that an argument holds."""
    from loratool.fetching.operands import Operand

    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, (str, os.PathLike)):
            yield Operand(os.fspath(each), ROLES.get(name, "any"), name)


def option_words(described: Option, default: Any, value: Any) -> list[str]:
    """The words of a command line for an option, with paths as they were given, and so with what it does not take."""
    as_given = [described.flags[0], str(value)]
    if isinstance(described.kind, PathKind) and isinstance(value, (str, os.PathLike)):
        return as_given
    try:
        return [*described.words(described.taken(value, default), default)]
    except LoratoolError:
        return as_given
