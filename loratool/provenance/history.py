"""The history of an adapter or a model, from the record that loratool wrote with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import printable
from loratool.files.hub_cache import name_of
from loratool.provenance.recorded import ancestors_of, made_of, table_of, text_of

if TYPE_CHECKING:
    from loratool.results.history import Ancestor

DIGESTS = ("sha256", "root", "header")  # of a file, the one that says most first


def history_of(place: Path, files: tuple[str, ...], metadata: Mapping[str, str] | None = None) -> Ancestor | None:
    """The history of a folder or a file; None where loratool did not make it, or its record is of other files.

    `files` are those that it consists of, `metadata` is that of the header of its one file.
    """
    made = made_of(place, dict.fromkeys(files, ""), metadata).get("made")
    return ancestor_of("", {"name": name_of(place), "made": made}) if made else None


def ancestor_of(role: str, entry: Mapping[str, Any]) -> Ancestor:
    """An entry about an input, as part of a history."""
    from loratool.results.history import Ancestor  # few things that are looked at have one

    made = table_of(entry.get("made"))
    weight: Any = entry.get("weight")
    return Ancestor(
        role=role,
        name=text_of(entry.get("name")),
        hub=text_of(entry.get("hub")),
        license=text_of(entry.get("license_name")) or text_of(entry.get("license")),
        weight=float(weight) if type(weight) in (int, float) and math.isfinite(weight) else None,
        digests=digests_of(entry),
        made_by=text_of(made.get("made_by")).removeprefix("loratool ") or ("an earlier run" if made.get("cut") else ""),
        command=text_of(made.get("command")),
        inputs=tuple(ancestor_of(role, each) for role, each in ancestors_of(made)),
    )


def digests_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """File → digest of an entry about an adapter or a model."""
    table = entry.get("sha256")
    if isinstance(table, Mapping):
        return {printable(name): text_of(value) for name, value in table.items()}
    files = table_of(entry.get("files")).items()
    known = {name: [text_of(facts.get(key)) for key in DIGESTS] for name, facts in files if isinstance(facts, Mapping)}
    return {printable(name): next(filter(None, texts), "") for name, texts in known.items()}
