"""What a `loratool.json` says, wherever it lies, and how the inputs of a run were made themselves.

A record of an earlier generation is taken over without the digests of its tensors: who made what, of what, and how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import InputError, LoratoolError, printable
from loratool.files.folders import PROVENANCE, record_for
from loratool.files.model_files import RECORD_KEY
from loratool.files.names import is_plain
from loratool.files.untrusted import LARGEST_RECORD, json_object, read_json
from loratool.files.weight_formats import read_weight_file

if TYPE_CHECKING:
    from loratool.files.digests import Digest

ROLES = ("base", "tuned", "shared", "adapter", "adapters", "inputs")  # of a record's entries about operands
LICENCE = ("license", "license_name", "license_link")  # as cards have it
MOST_GENERATIONS = 24  # a text of JSON may have so many levels, and each generation takes a few
MOST_ANCESTORS = 400
LONGEST_TEXT = 8000  # characters of a text that is taken over
KEPT = ("made_by", "command", "versions", "gain", "dtype")  # of an earlier record, besides its inputs
KEPT_OF_FILE = ("size", "sha256", "function", "root", "header")
KEPT_OF_INPUT = ("name", "hub", "id", "quantised", *LICENCE, "format", "weight", "rank", "sha256")


def record_at(place: Path, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The record of a folder or of one file, whose header may have been read; raises `InputError` where none can be read."""
    path = record_for(place)
    if path.is_file():
        return read_json(path, LARGEST_RECORD)
    if place.is_file() and (told := in_header(place, metadata)):
        return told
    if not place.exists():
        raise InputError(f"{printable(place)}: no such file or folder")
    raise InputError(f"{printable(place)}: has no {PROVENANCE}: loratool did not make it, or the record was removed")


def in_header(path: Path, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The record that a weight file holds itself; empty where it holds none."""
    try:
        text = (read_weight_file(path).metadata if metadata is None else metadata).get(RECORD_KEY, "")
        return json_object(text.encode()) if text else {}
    except (LoratoolError, ValueError):
        return {}


def table_of(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def text_of(value: object) -> str:
    return printable(value) if isinstance(value, str) else ""


def inputs_of(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(role, entry) of each input that a record names, in the order of the operands."""
    for role in ROLES:
        entries = record.get(role)
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, Mapping):
                yield {"adapters": "adapter", "inputs": "adapter"}.get(role, role), entry


def models_of(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(keyword, entry) of each model that an option of the run named."""
    for keyword, entry in table_of(record.get("models")).items():
        if isinstance(entry, Mapping):
            yield printable(keyword), entry


def ancestors_of(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(role, entry) of everything that a record names as what its output was made of."""
    yield from inputs_of(record)
    yield from models_of(record)


def quantised_base(record: Mapping[str, Any], generations: int = MOST_GENERATIONS) -> str:
    """How the base was quantised whose decoded weights an adapter is a difference from; empty where it was not.

    Where the record is that of a copy, such as by `resize`, that of what it was made of tells.
    """
    for role, entry in inputs_of(record):
        if role == "base" and isinstance(said := entry.get("quantised"), str):
            return said
        if generations and (found := quantised_base(table_of(entry.get("made")), generations - 1)):
            return found
    return ""


def made_of(place: Path, files: Mapping[str, str], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The entry "made" of an input: how it was made itself; nothing where loratool did not make it as it is.

    Args:
        place: its folder, or its file.
        files: names of files that it consists of, with their SHA-256 where that is known; a record that lists others
            for them is not about what is there.
        metadata: of the header of its file of weights, which may hold the record.
    """
    folder = place if place.is_dir() else place.parent
    try:
        record = record_at(place, metadata)

        from loratool.files.digests import read_recorded  # with hashlib, which is not needed where there is no record

        listed = read_recorded(record)
        if not all(is_listed(listed.get(name), folder / name, sha256) for name, sha256 in files.items()):
            record = {}
    except (LoratoolError, OSError):
        record = {}
    found = shortened(record or in_header(place, metadata or {}), iter(range(MOST_ANCESTORS)))
    return {"made": found} if isinstance(found.get("made_by"), str) else {}


def is_listed(digest: Digest | None, path: Path, sha256: str) -> bool:
    """Whether a file is the one that a record lists, as far as its size and a SHA-256 that may be known tell."""
    if digest is None or digest.size != path.stat().st_size:
        return False
    return not sha256 or not digest.sha256 or digest.sha256 == sha256


def shortened(record: Mapping[str, Any], budget: Iterator[int], generation: int = 1) -> dict[str, Any]:
    """A record without the digests of its tensors, and with its own inputs shortened in the same way.

    Each ancestor that is taken over takes one item of `budget`.
    """
    found = {key: bounded(record[key]) for key in KEPT if key in record}
    for role in ROLES:
        entries = record.get(role)
        listed = (each for each in (entries if isinstance(entries, list) else [entries]) if isinstance(each, Mapping))
        if kept := [entry_of(each, budget, generation) for each, _ in zip(listed, budget, strict=False)]:
            found[role] = kept if isinstance(entries, list) else kept[0]
    models = zip(models_of(record), budget, strict=False)
    if kept_models := {key: entry_of(each, budget, generation) for (key, each), _ in models}:
        found["models"] = kept_models
    return found


def entry_of(entry: Mapping[str, Any], budget: Iterator[int], generation: int) -> dict[str, Any]:
    """An input of an earlier record, with how it was made."""
    found = {key: bounded(entry[key]) for key in KEPT_OF_INPUT if key in entry}
    files = entry.get("files")
    if isinstance(files, Mapping):
        kept = {name: facts for name, facts in files.items() if isinstance(facts, Mapping) and is_plain(name)}
        found["files"] = {n: {k: bounded(f[k]) for k in KEPT_OF_FILE if k in f} for n, f in kept.items()}
    if isinstance(made := entry.get("made"), Mapping):
        found["made"] = shortened(made, budget, generation + 1) if generation < MOST_GENERATIONS else {"cut": True}
    return found


def bounded(value: Any) -> Any:
    """A plain value of a record that anybody may have written; anything large is left out."""
    return value if len(json.dumps(value)) <= LONGEST_TEXT else None
