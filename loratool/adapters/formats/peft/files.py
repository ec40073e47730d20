"""The files of an adapter as PEFT saves it, and its config as a checked dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapters.formats.peft.keys import family_of, path_of
from loratool.adapters.weight_files import weight_files, without_config
from loratool.errors import InputError, Problem, UsageError, printable
from loratool.files.checkpoint import check_index, check_numbering, read_index, read_shards
from loratool.files.containers import foreign_file, instead_of_weights
from loratool.files.folders import INDEX_SUFFIX, NUMBERED, sort_side_files
from loratool.files.hub_names import way_inside
from loratool.files.model_files import FileNames
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.untrusted import read_json
from loratool.files.views import SafeFiles
from loratool.notes import Note

CONFIG = "adapter_config.json"
AGAINST_TENSORS = "config-against-tensors"  # the code of a problem: the config does not say what the tensors show
WEIGHTS = "adapter_model.safetensors"
STEM = "adapter_model"
INDEX = STEM + INDEX_SUFFIX  # PEFT writes one file; other tools cut it
PICKLED = ("adapter_model.bin", "adapter_model.pt")
NAMES = FileNames(
    weights=r"adapter_model(?:\.\w+)?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|adapter_model\.safetensors\.index(?:\.\w+)?\.json",
    others=r"adapter_config\.json",
)


def recognises(path: Path) -> bool:
    """Whether `path` looks like a PEFT adapter, its format's faults included."""
    if path.suffix == ".safetensors" or path.name == INDEX:
        return path.is_file() or path.is_symlink()
    return any(
        (path / name).is_symlink() or (path / name).exists() for name in (CONFIG, WEIGHTS, INDEX, *PICKLED)
    ) or bool(nested(path))


def nested(path: Path) -> list[Path]:
    """Direct subfolders that hold an adapter, as PEFT writes them for adapters with a name."""
    try:
        return sorted(folder for folder in path.iterdir() if (folder / CONFIG).is_file())
    except OSError:
        return []


def open_weights(path: Path, notes: list[Note], adapter_name: str | None) -> tuple[Path, SafeFile]:
    """The folder of the adapter at `path`, and its file, or its files as one.

    Raises `InputError` where there are none, or others than safetensors, with the way to these.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return path.parent, joined(path)
    if path.suffix == ".safetensors":
        if (match := NUMBERED.match(path.name)) and int(match["count"]) > 1:
            raise InputError(
                f"{printable(path)}: is one of {int(match['count'])} shards; pass the folder that contains them"
            )
        return path.parent, read_safefile(path)
    folder = folder_of(path, notes, adapter_name)
    names, index = weight_names(folder)
    if index:
        return folder, joined(folder / index)
    if len(names) > 1:
        return folder, SafeFiles.of(folder / names[0], read_shards(folder, names))
    if names:
        return folder, read_safefile(folder / names[0])
    for name in PICKLED:
        if (folder / name).exists():
            raise InputError(f"{printable(folder / name)}: {foreign_file(folder / name)}")
    file = by_header(folder)
    if file is None:
        told = instead_of_weights(folder, CONFIG) or "copy it from the training output"
        raise InputError(f"{printable(folder)}: {WEIGHTS} is missing; {told}")
    notes.append(
        Note("other-name", f"its weights were read from {printable(file.path.name)}; PEFT reads {WEIGHTS} only")
    )
    return folder, file


def folder_of(path: Path, notes: list[Note], adapter_name: str | None) -> Path:
    """The folder of the adapter: the one that is given, or the one in it that is meant."""
    if any((path / name).exists() for name in (CONFIG, WEIGHTS)):
        return path
    every = nested(path)
    names = ", ".join(printable(folder.name) for folder in every)
    inside = [folder for folder in every if adapter_name in (None, folder.name)]
    if every and not inside:
        raise UsageError(f"{printable(path)}: has no adapter {printable(repr(adapter_name))}; it has {names}")
    if len(inside) > 1:
        raise InputError(
            f"{printable(path)}: contains several adapters ({names}); pass one of its subfolders, or each of them as an adapter of its own"
        )
    if inside:
        notes.append(Note("subfolder", f"read from the subfolder {printable(inside[0].name)}"))
    return inside[0] if inside else path


def weight_names(folder: Path) -> tuple[list[str], str]:
    """The adapter's files of weights by their names alone, and the name of their index, if they have one."""
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return [WEIGHTS], ""
    if (folder / INDEX).is_file():
        return list(dict.fromkeys(read_index(folder / INDEX)[0].values())), INDEX
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    parts = [name for name in found if (match := NUMBERED.match(name)) and match["stem"] == STEM]
    if parts:
        check_numbering(folder, parts)
    return parts, ""


def joined(index: Path) -> SafeFile:
    """The files that an index names, as one."""
    weight_map, _ = read_index(index)
    shards = read_shards(index.parent, list(dict.fromkeys(weight_map.values())))
    check_index(index, weight_map, index.parent, shards)
    return SafeFiles.of(index, shards)


def by_header(folder: Path) -> SafeFile | None:
    """The one file with factors in a folder whose config says that there is an adapter; None where there is none."""
    files = [read_safefile(path) for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    found = [file for file in files if any(family_of(".".join(path_of(name))) for name in file.tensors)]
    if len(found) > 1:
        names = ", ".join(printable(file.path.name) for file in found)
        raise InputError(
            f"{printable(folder)}: {WEIGHTS} is missing, and several files contain factors ({names}); pass the path "
            "of one"
        )
    return found[0] if found else None


def needed(location: Path) -> tuple[list[str], list[str]]:
    """The files that reading a folder takes, as paths in it: weights, and others."""
    names = {path.name for path in location.iterdir() if not path.is_dir()}
    inside = "" if {CONFIG, WEIGHTS, INDEX} & names else f"{only_nested(location)}/"
    weights, listing = weight_names(location / inside)
    if not weights and not any((location / inside / name).exists() for name in PICKLED):
        weights = sorted(path.name for path in (location / inside).glob("*.safetensors"))  # by another name
    side = sort_side_files(location / inside, {*weights})[0]
    if not weights:
        return [], [f"{inside}{n}" for n in (CONFIG, *side)]
    trained = [file for file in weight_files(location / inside, None, {*weights}) if file.counts]
    heads = [file.name for file in trained if file.is_safetensors]  # what they hold is told by their headers
    rest = dict.fromkeys([CONFIG, *([listing] if listing else []), *side, *(file.name for file in trained)])
    return [f"{inside}{n}" for n in (*weights, *heads)], [f"{inside}{n}" for n in rest if n not in heads]


def only_nested(folder: Path) -> str:
    """The one subfolder that holds an adapter, as PEFT writes it for an adapter with a name."""
    found = [inside.name for inside in nested(folder)]
    if len(found) != 1:
        listed = ", ".join(map(printable, found))
        shown = printable(folder)
        way = way_inside(shown, printable(found[0])) if found else ""
        raise InputError(f"{shown}: contains several adapters ({listed}); name one{way}")
    return found[0]


def config_at(path: Path) -> Path:
    """The config of the adapter at `path`: a file, its folder, or the folder above."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file() and len(inside := sorted(folder.glob(f"*/{CONFIG}"))) == 1:
        folder = inside[0].parent
    return folder / CONFIG


def read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict. Problems are told without repeating the file's text."""
    if not os.path.lexists(path) and path.parent.is_dir():
        raise without_config(path)
    config = read_json(path, lenient=True)
    if not {"peft_type", "r", "lora_alpha"} & set(config):
        raise InputError(f"{printable(path)}: not an adapter config: it has no peft_type, r or lora_alpha")
    return config


# Fields that more than one place reads, each with its type, and whether it may be a list of it; null is allowed for each.
# What one method alone reads, it checks itself.
TYPES: Mapping[str, tuple[type, bool, str]] = {
    "bias": (str, False, "text"),
    "exclude_modules": (str, True, "text or a list of texts"),
    "feedforward_modules": (str, True, "text or a list of texts"),
    "layers_pattern": (str, True, "text or a list of texts"),
    "layers_to_transform": (int, True, "a whole number or a list of them"),
    "modules_to_save": (str, True, "a list of texts"),
    "target_modules": (str, True, "text or a list of texts"),
    "target_parameters": (str, True, "a list of texts"),
}


def wrong_fields(config: Mapping[str, Any]) -> dict[str, Problem]:
    """Each field that holds a value of another type, with a sentence that says so."""
    return {
        name: Problem(f"{CONFIG}: {name} is {printable(repr(value))}; expected {wanted}", AGAINST_TENSORS)
        for name, (kind, listed, wanted) in TYPES.items()
        if (value := config.get(name)) is not None
        and any(type(each) is not kind for each in (value if listed and isinstance(value, list) else [value]))
    }
