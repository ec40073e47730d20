"""Which adapters are meant: those in a folder, of a pattern with wildcards, or named in a file."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from loratool.adapters.formats import FORMATS, NAMED
from loratool.adapters.formats.known import RANK
from loratool.adapters.weight_files import MODEL_CONFIG
from loratool.arguments import PathLike
from loratool.errors import InputError, UsageError, printable
from loratool.files.folders import INDEX_SUFFIX, MODEL_INDEX, NUMBERED, WEIGHT_FILES
from loratool.files.untrusted import read_file_or_stdin, source_name
from loratool.stores.names import is_in_store, parse_store

WILD = frozenset("*?[")
# With one of these a folder is one adapter; named so by one format, whatever else is in it.
CONFIG_OR_FACTORS = frozenset(
    {
        *("adapter_config.json", "adapter_model.safetensors.index.json", "adapter_model.bin", "adapter_model.pt"),
        *("adapters.npz", "pytorch_lora_weights.bin"),  # which are not read, and said to be so
    }
)
WEIGHTS = frozenset(form.weights_name for form in FORMATS)
MODELS = frozenset({MODEL_CONFIG, MODEL_INDEX})
STAGE = ".partial"  # how folders end that a command is still writing


@dataclass(frozen=True)
class Member:
    """What may be an adapter."""

    path: Path
    name: str  # as the table has it
    named: bool = False  # by the user, not found in a folder


def members(operands: Sequence[PathLike]) -> list[Member]:
    """All that some operands mean, in their order, each once; what is in a folder, by name.

    Names are those within the folder where one is all that was named, else whole paths, so that no two are the same.
    """
    found: dict[str, Member] = {}
    for operand in operands:
        for member in meant_by(os.fspath(operand)):
            found.setdefault(os.path.normpath(member.path), member)
    alone = len(operands) == 1
    return [member if alone else replace(member, name=member.path.as_posix()) for member in found.values()]


def meant_by(text: str) -> Iterator[Member]:
    """What one operand means: what a pattern matches, what a folder holds, or what it names."""
    if not is_pattern(text):
        yield from of_path(Path(text), named=True)
        return
    if is_in_store(text):
        raise UsageError(
            f"{printable(text)}: wildcards are not matched in a store; pass the prefix that holds the adapters"
        )
    matched = sorted(glob.glob(os.path.expanduser(text), recursive=True))
    if not matched:
        raise InputError(f"{printable(text)}: no file or folder matches this pattern")
    for path in matched:
        for member in of_path(Path(path), named=False):
            yield replace(member, name=member.path.as_posix())


def is_pattern(text: str) -> bool:
    """Whether an operand has wildcards and is not itself the name of something."""
    return not WILD.isdisjoint(text) and not os.path.lexists(text)


def of_path(path: Path, named: bool) -> Iterator[Member]:
    folder = folder_of(path)
    if folder is not None and holds_fleet(folder):
        for found in walk(folder):
            name = found.relative_to(folder).as_posix()
            yield Member(path / name, name)
    else:
        yield Member(path, path.as_posix(), named)


def folder_of(path: Path) -> Path | None:
    """The folder whose names tell what is there: a path itself, or an outline of a prefix in a store; None for a file."""
    if is_in_store(path) and (place := parse_store(path)) is not None:
        from loratool.fetching.stores import names_below

        return names_below(place)
    return path if path.is_dir() else None


def listed(path: str) -> list[str]:
    """The names in a file, one a line; empty lines and those after # count for nothing. `-` is stdin."""
    raw, shown = read_file_or_stdin(path), source_name(path)
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: not UTF-8 (byte {error.start}); expected one path per line") from None
    found = [os.path.expanduser(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"{shown}: names no adapter; expected one path per line")
    return found


def holds_fleet(folder: Path | None) -> bool:
    """Whether a folder is no adapter and no model itself, and holds several adapters, or one further inside."""
    names = names_in(folder) if folder is not None else frozenset()
    if folder is None or not names or is_unit(names) or is_model(names):
        return False
    own = len(list(islice(NAMED.adapters_in(folder), 2)))
    deeper = list(islice((path for path in walk(folder) if path.parent != folder or path.is_dir()), 2))
    return own + len(deeper) > 1 or (len(deeper) == 1 and deeper[0].parent != folder)


def walk(folder: Path, seen: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The adapters in a folder, and in those within it; nothing inside an adapter or a model, or in hidden folders."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        inside = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        here = os.path.realpath(folder)
    except OSError:
        return
    yield from lone(folder, frozenset(entry.name for entry in entries))
    for name in inside:
        path = folder / name
        within = names_in(path)
        if name.endswith(STAGE) or os.path.realpath(path) in seen | {here}:
            continue
        if is_unit(within) or is_model(within):
            yield path
        else:
            yield from walk(path, seen | {here})


def names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def is_unit(names: frozenset[str]) -> bool:
    """Whether a folder with files and folders of these names is one adapter."""
    if any(map(RANK.fullmatch, names)):  # each process of a run saved a part of it
        return True
    weights = [name for name in names if name.endswith(WEIGHT_FILES)]
    return not CONFIG_OR_FACTORS.isdisjoint(names) or (len(weights) == 1 and weights[0] in WEIGHTS)


def is_model(names: frozenset[str]) -> bool:
    """Whether a folder with files of these names is a model."""
    weights = any(name.endswith(WEIGHT_FILES) for name in names)
    return MODEL_INDEX in names or (weights and not MODELS.isdisjoint(names)) or any(is_shard(name) for name in names)


def is_shard(name: str) -> bool:
    return name.endswith(INDEX_SUFFIX) or NUMBERED.match(name) is not None


def lone(folder: Path, names: frozenset[str]) -> Iterator[Path]:
    """The files of weights of a folder, each of which may be an adapter."""
    for name in sorted(names):
        if name.endswith(WEIGHT_FILES) and not is_shard(name) and not name.startswith("."):
            yield folder / name


def is_table(operands: Sequence[PathLike]) -> bool:
    """Whether any of some operands means several adapters."""
    return any(is_pattern(os.fspath(o)) or holds_fleet(folder_of(Path(o))) for o in operands)
