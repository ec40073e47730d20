"""A bill of materials: an output, what it was made of, and how, as its record and its files tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.errors import VerificationError, escaped, printable
from loratool.files.digests import Digest, is_hex, read_recorded, sha256_of
from loratool.files.folders import folder_and_name, record_for
from loratool.files.hub_cache import HUB_ID
from loratool.files.names import is_plain
from loratool.files.process import cores
from loratool.provenance import record
from loratool.provenance.recorded import ancestors_of, record_at, table_of, text_of

LARGEST_NUMBER = 1e30  # of a record; none of ours comes near


@dataclass(frozen=True)
class Content:
    """A file, and what is known of its bytes; digests are in hexadecimal, and empty where they are not known."""

    name: str
    size: int | None
    sha256: str  # of all of it
    root: str = ""  # over the digests of its tensors (docs/provenance.md)
    header: str = ""


@dataclass(frozen=True)
class Part:
    """A model or an adapter in a bill, and what it was made of. Texts are as records have them, but printable."""

    role: str  # output, or what it was to a command: base, tuned, shared, adapter
    name: str
    kind: str  # model or adapter
    repo: str  # on the Hub; empty where it was a local one
    revision: str  # its commit
    license: str
    license_link: str
    weight: float | None  # of an adapter that was merged
    files: tuple[Content, ...]
    command: str  # that made it; empty where loratool did not
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    gain: float | None  # the part of the updates that rounding left
    inputs: tuple[Part, ...]

    @property
    def all(self) -> list[Part]:
        """Itself, and everything that it was made of, each before what that was made of."""
        return [self, *(each for part in self.inputs for each in part.all)]


def bill_of(place: Path) -> Part:
    """The bill of an output, with the SHA-256 of each of its files, which are read for it.

    Raises:
        InputError: it has no record.
        VerificationError: its files are not those of the record.
    """
    table = record_at(place)
    if problems := record.compare(place).problems:
        raise VerificationError(f"{printable(place)}: differs from its record; {record.WAY_OUT}:", problems)
    listed: Mapping[str, Digest | None] = read_recorded(table) or {place.name: None}
    folder, path = folder_and_name(place)[0], record_for(place)
    # one that is missing counts for nothing in the model, as its comparison with the record found no problem
    names = [name for name in dict.fromkeys((*listed, path.name)) if (folder / name).is_file()]
    with ThreadPoolExecutor(cores()) as pool:
        known = {name: digest.sha256 for name, digest in listed.items() if digest and digest.sha256}
        found = dict(zip(names, pool.map(lambda n: known.get(n) or sha256_of(folder / n), names), strict=True))
    files = tuple(
        Content(printable(n), (folder / n).stat().st_size, found[n], tree.root, tree.header)
        if (digest := listed.get(n)) and (tree := digest.tree)
        else Content(printable(n), (folder / n).stat().st_size, found[n])
        for n in names
    )
    made = str(table.get("made_by", ""))
    part = part_of("output", {"name": os.path.basename(os.path.abspath(place)), "made": table})
    return replace(part, kind="model" if made == "loratool merge" else "adapter", files=files)


def part_of(role: str, entry: Mapping[str, Any]) -> Part:
    """An entry of a record about an input, as a part; everything in it may have been written by anybody."""
    made = table_of(entry.get("made"))
    repo, _, revision = text_of(entry.get("hub")).partition("@")
    sound = bool(HUB_ID.fullmatch(repo))
    return Part(
        role=role,
        name=text_of(entry.get("hub") or entry.get("name")) or "unnamed",
        kind="adapter" if role in ("adapter", "shared") else "model",
        repo=repo if sound else "",
        revision=revision.partition(":")[0] if sound else "",
        license=text_of(entry.get("license_name")) or text_of(entry.get("license")),
        license_link=text_of(entry.get("license_link")),
        weight=number_of(entry.get("weight")),
        files=contents_of(entry),
        command=escaped(command) if isinstance(command := made.get("command"), str) else "",
        versions={printable(k): text_of(v) for k, v in table_of(made.get("versions")).items()},
        options=table_of(made.get("options")),
        gain=number_of(made.get("gain")),
        inputs=tuple(part_of(role, each) for role, each in ancestors_of(made)),
    )


def contents_of(entry: Mapping[str, Any]) -> tuple[Content, ...]:
    """The files of an entry: those of a model with their digests, or those of an adapter with their SHA-256."""
    files = table_of(entry.get("files"))
    plain = {name: {"sha256": sha256} for name, sha256 in table_of(entry.get("sha256")).items()}
    return tuple(
        Content(
            name=printable(name),
            size=size if type(size := facts.get("size")) is int and size >= 0 else None,
            sha256=hex_of(facts.get("sha256")),
            root=hex_of(facts.get("root")),
            header=hex_of(facts.get("header")),
        )
        for name, facts in {**files, **plain}.items()
        if is_plain(name) and isinstance(facts, Mapping)
    )


def hex_of(value: object) -> str:
    return str(value) if is_hex(value) else ""


def number_of(value: object) -> float | None:
    """A number of a record that may be written anywhere."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER else None
