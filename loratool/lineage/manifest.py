"""A manifest: a YAML file with `steps:`, each a command of the library with its keywords.

It is read by PyYAML's safe loader, which makes plain values only; what is wrong is told with its line and step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import InputError, LoratoolError, printable
from loratool.files.untrusted import read_file_or_stdin, source_name
from loratool.lazy import yaml
from loratool.lineage.makers import Maker, Makers
from loratool.options.described import JsonFile, Options, PathKind, described_by, keyword_near, made_of, nearest
from loratool.stores.names import is_in_store, parse_store

LARGEST = 1 << 20  # bytes of a manifest
OURS = ("overwrite", "dry_run")  # what `run` decides itself
HELP = "loratool run --help"  # the hint where a manifest is not understood
FULL = {"digests": "full"}  # so that it can be seen whether a local base is still the same


@dataclass(frozen=True)
class Step:
    """A run that a manifest asks for."""

    number: int
    where: str  # file, line, step and command, for messages
    command: str
    maker: Maker
    operands: tuple[str, ...]
    out: Path
    keywords: Mapping[str, Any]
    options: Options

    @property
    def inputs(self) -> list[str]:
        """All places that it reads: operands, and models that options name."""
        models = (getattr(self.options, name) for name in sorted(self.maker.models))
        return [*self.maker.places(self.operands), *(each for each in models if each is not None)]

    def make(self, overwrite: bool) -> None:
        """Do it."""
        self.maker.function(**self.maker.arguments(self.operands), out=self.out, overwrite=overwrite, **self.keywords)


def read_manifest(path: Path, makers: Makers) -> list[Step]:
    """The steps of a manifest, a file or `-` for stdin. Raises `InputError` with everything that is wrong with it."""
    shown = source_name(path)
    if is_in_store(path):
        raise InputError(f"{shown}: a manifest must be a local file; its steps may name s3:// addresses")
    table = entries(parsed(path), shown)
    if unknown := sorted(table.keys() - {"steps"}):
        raise InputError(
            f"{shown}: unknown keys: {', '.join(map(printable, unknown))}; the only key is steps", hint=HELP
        )
    if "steps" not in table or not isinstance(table["steps"], yaml.SequenceNode) or not table["steps"].value:
        raise InputError(f"{shown}: steps must be a list of commands with their keywords")
    steps: list[Step] = []
    problems: list[str] = []
    for number, node in enumerate(table["steps"].value, 1):
        try:
            steps.append(step_of(number, node, path, makers))
        except LoratoolError as error:
            problems.append(f"line {node.start_mark.line + 1}, step {number}: {error.message}")
            problems += [f"line {node.start_mark.line + 1}, step {number}: {each}" for each in error.problems]
    problems += misplaced(steps)
    if problems:
        raise InputError(f"{shown}: the manifest cannot be run:", problems, hint=HELP)
    return steps


def parsed(path: Path) -> Any:
    """The nodes of a YAML file, none of which has been made a value."""
    raw, shown = read_file_or_stdin(path, LARGEST), source_name(path)
    try:
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{shown}: is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{shown}{line}: not valid YAML ({printable(getattr(error, 'problem', '') or 'malformed')})", hint=HELP
        ) from None
    if root is None:
        raise InputError(f"{shown}: is empty")
    return root


def entries(node: Any, shown: str) -> dict[str, Any]:
    """The nodes of a mapping by their keys, each of which is there once."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{shown}: must have keys and values, such as `steps:` at the top of a manifest")
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
        if not name or name in found:
            raise InputError(
                f"{shown}: line {key.start_mark.line + 1}: {printable(name or 'a key')} is not a key, or is duplicated"
            )
        found[name] = value
    return found


def step_of(number: int, node: Any, path: Path, makers: Makers) -> Step:
    """One step; raises a `LoratoolError` that does not say where."""
    table = entries(node, "a step")
    if len(table) != 1:
        raise InputError(
            "must have one command, such as `- merge: {base: ./base, adapters: [./style], output: ./made}`"
        )
    ((command, inner),) = table.items()
    if command not in makers:
        meant = f"; did you mean {near!r}? The" if (near := nearest(command, makers)) else "; the"
        raise InputError(f"unknown command {printable(command)}{meant} commands are {', '.join(makers)}")
    maker = makers[command]
    values = {key.replace("-", "_"): value_of(each) for key, each in entries(inner, command).items()}
    out = values.pop("output", values.pop("out", None))
    if not isinstance(out, str) or not out:
        raise InputError(f"{command}: output is missing")
    home = path.parent
    known = described_by(maker.options)
    if own := [name for name in OURS if name in values]:
        raise InputError(f"{command}: {', '.join(own)} is decided by `loratool run`")
    if unknown := [*unknown_keywords(values, maker)]:
        raise InputError(f"{command}: {', '.join(unknown)}")
    given = [*operands(command, maker, values, home)]
    for name in values.keys() & known.keys():
        values[name] = at_home(known[name][0].kind, values[name], home)
    if "digests" in known and known["digests"][0].recorded:
        values = {**FULL, **values}
    options = made_of(maker.options, values, command)
    where = f"{source_name(path)}, step {number} ({command})"
    return Step(number, where, command, maker, tuple(given), place(out, home), values, options)


def unknown_keywords(values: Iterable[str], maker: Maker) -> Iterator[str]:
    """What is wrong with each keyword that a command does not have."""
    operands = [name.removesuffix("*") for name in maker.operands]
    for name in values:
        if name not in (*operands, *described_by(maker.options)):
            near = keyword_near(name, maker.options, [*operands, "output"])
            meant = f"; did you mean {near!r}?" if near else ""
            yield f"unknown keyword {printable(repr(name))}{meant}"


def value_of(node: Any) -> Any:
    """The plain value of a node, as PyYAML's safe loader makes it."""
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = printable(getattr(error, "problem", "") or "malformed")
        raise InputError(f"line {node.start_mark.line + 1}: {problem}") from None


def operands(command: str, maker: Maker, values: dict[str, Any], home: Path) -> Iterator[str]:
    """The operands, places as paths, which are taken out of the values."""
    for number, name in enumerate(maker.operands):
        key = name.removesuffix("*")
        given = values.pop(key, None)
        listed = given if isinstance(given, list) and name.endswith("*") else [given]
        if given is None and name.endswith("*"):
            continue
        for each in listed:
            if not isinstance(each, str) or not each:
                raise InputError(f"{command}: {key} must be {'paths' if name.endswith('*') else 'a path'}")
            yield each if maker.is_word(number) else operand(each, home)


def operand(word: str, home: Path) -> str:
    """A path from the folder of the manifest; what is neither one nor there may be a place on the Hub."""
    path = place(word, home)
    is_path = word.startswith((".", "/", "~")) or os.path.isabs(word) or os.path.lexists(path)
    return os.fspath(path) if is_path else word


def place(word: str, home: Path) -> Path:
    """A path from a folder, as an absolute one, or a place in a store."""
    if (stored := parse_store(word)) is not None:
        return Path(str(stored))
    return Path(os.path.abspath(home / os.path.expanduser(word)))


def at_home(kind: Any, value: Any, home: Path) -> Any:
    """A value in which paths are from the folder of the manifest."""
    if isinstance(value, list):
        return [at_home(kind, each, home) for each in value]
    if isinstance(kind, (PathKind, JsonFile)) and isinstance(value, str) and not getattr(kind, "beside", False):
        return operand(value, home) if not value.lstrip().startswith(("{", "[")) else value
    return value


def misplaced(steps: Sequence[Step]) -> Iterator[str]:
    """What keeps steps from being run one after the other."""
    made: dict[Path, int] = {}
    for step in steps:
        if step.out in made:
            yield f"step {step.number} has the output of step {made[step.out]}, {printable(step.out)}"
        made.setdefault(step.out, step.number)
    for step in steps:
        for each in step.inputs:
            makes = [number for out, number in made.items() if is_within(out, each)]
            if os.path.isabs(each) and not os.path.lexists(each) and not makes:
                yield f"step {step.number}: {printable(each)}: no such file or folder"
            if makes and max(makes) >= step.number:
                yield f"step {step.number} needs {printable(each)}, which step {max(makes)} makes; put it first"


def is_within(out: Path, place: str) -> bool:
    """Whether an output is an input of a step, or in a folder that is one."""
    return Path(place) in (out, *out.parents)
