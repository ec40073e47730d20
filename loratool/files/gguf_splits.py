"""A GGUF model in one file, or in those that `llama-gguf-split` makes of it: `NAME-00001-of-00003.gguf` and so on."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import InputError, printable
from loratool.templates import first_few

if TYPE_CHECKING:
    from loratool.files.gguf import GgufFile

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 10_000


def read_splits(path: Path) -> tuple[GgufFile, ...]:
    """The files of the model that a file is, or is one of.

    Raises `InputError` where one of them is missing, or is a part of another model: all of what is wrong at once.
    """
    from loratool.files.gguf import read_gguf

    first = read_gguf(path)
    count = first.number("split.count")
    if count <= 1:
        return (first,)
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count or count > MOST_PARTS:
        raise InputError(
            f"{printable(path)}: is one of {count} parts by its metadata, but its name does not end in -00001-of-{count:05d}.gguf"
        )
    names = names_of_parts(path.name)
    if missing := [name for name in names if not os.path.lexists(path.parent / name)]:
        raise InputError(
            f"{printable(path)}: {len(missing)} of its {count} parts are missing:", map(printable, missing)
        )
    parts = tuple(read_gguf(path.parent / name) for name in names)
    problems = [why for number, part in enumerate(parts) for why in unlike(part, number, parts)]
    owners = Counter(name for part in parts for name in part.tensors)
    problems += [f"{printable(name)}: is in {count} of the parts" for name, count in owners.items() if count > 1]
    if problems:
        raise InputError(f"{printable(path)}: its parts do not belong together:", problems)
    return parts


def names_of_parts(name: str) -> list[str]:
    """The files of the model that a file is, or is one of, by its name."""
    match = PART.fullmatch(name)
    if match is None or int(match["count"]) > MOST_PARTS:
        return [name]
    return [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def unlike(part: GgufFile, number: int, parts: tuple[GgufFile, ...]) -> list[str]:
    """What a part says that does not hold of it among the others."""
    said = {key: part.values.get(f"split.{key}") for key in ("no", "count", "tensors.count")}
    true = {"no": number, "count": len(parts), "tensors.count": sum(len(each.tensors) for each in parts)}
    return [
        f"{printable(part.path.name)}: split.{key} is {printable(said[key])}, but must be {true[key]}"
        for key in true
        if said[key] != true[key]
    ]


def gguf_in(folder: Path) -> Path | None:
    """The file of the one GGUF model in a folder, the first of its parts; None where there is none.

    Raises `InputError` where there are several.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".gguf") and not entry.is_dir())
    firsts = [name for name in names if (match := PART.fullmatch(name)) is None or int(match["number"]) == 1]
    firsts = firsts or names[:1]
    if len(firsts) > 1:
        raise InputError(f"{printable(folder)}: several GGUF models ({first_few(firsts, 8)}); pass the path of one")
    return folder / firsts[0] if firsts else None
