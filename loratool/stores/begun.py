"""What is being made below a prefix of a store, as any number of workers share it, and what may be replaced there.

    OUT/.loratool/begin.json   what is being made, by whoever came first: all others compare
    OUT/.loratool/plan.json    the id of the upload of each weight file, created once
    OUT/.loratool/part-*.json  a record of each part that is in the store
    OUT/.loratool/finish.json  from here on files of the output get their names

An output of one object has a folder of its own in the `.loratool` next to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import UsageError, printable
from loratool.files.digests import read_recorded
from loratool.files.folders import PROVENANCE
from loratool.files.untrusted import LARGEST_RECORD, check_bound, json_or_empty
from loratool.stores import uploads
from loratool.stores.names import StorePath

FORMAT = 1
HEAD = "loratool_upload"
BEGIN, PLAN, FINISH = "begin.json", "plan.json", "finish.json"
COMMAND = re.compile(r"[a-z]{1,20}")


@dataclass(frozen=True)
class Begun:
    """What is being made below a prefix."""

    plan: str  # the fingerprint of the merge, or of the files where another command made them
    parts: str  # digest of how files are cut, on which all workers must agree
    weights: tuple[str, ...]  # names of the files that are uploaded in parts
    others: tuple[str, ...]  # names of all other files
    replaces: tuple[str, ...] = ()  # names of what was there, and goes
    before: tuple[str, ...] = ()  # uploads of these files that were there already, and are somebody else's
    command: str = "merge"  # what makes it

    def to_bytes(self) -> bytes:
        return (json.dumps({HEAD: FORMAT, **vars(self)}, sort_keys=True) + "\n").encode()

    @classmethod
    def of_bytes(cls, raw: bytes) -> Begun | None:
        """What was stored; None for anything else."""
        table = json_or_empty(raw)
        names = [table.get(key) for key in ("weights", "others", "replaces", "before")]
        if table.get(HEAD) != FORMAT or not all(map(are_texts, names)):
            return None
        match table:
            case {"plan": str(plan), "parts": str(parts)}:
                weights, others, replaces, before = (tuple(each or ()) for each in names)
                command = str(table.get("command", "merge"))
                command = command if COMMAND.fullmatch(command) else "output"
                return cls(plan, parts, weights, others, replaces, before, command)
        return None

    def keys(self, place: StorePath) -> dict[str, str]:
        """The names of weight files by their keys."""
        return {(place / name).key: name for name in self.weights}


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def read_begun(home: StorePath) -> Begun | None:
    """What is being made by what is in a folder `.loratool`; None where nothing is.

    Raises `UsageError` where what says so cannot be read.
    """
    raw = uploads.get(home / BEGIN)
    if raw is None:
        return None
    check_bound(str(home / BEGIN), len(raw), LARGEST_RECORD)
    if (found := Begun.of_bytes(raw)) is None:
        raise UsageError(f"{home / BEGIN}: not written by this release of loratool; choose another OUT")
    return found


def read_plan(raw: bytes, plan: str) -> dict[str, str]:
    """The uploads of a plan; empty where it is of another one, or cannot be read."""
    match json_or_empty(raw):
        case {"plan": found, "uploads": dict(named)} if found == plan:
            return {str(name): str(upload) for name, upload in named.items()}
    return {}


def is_ours(name: str) -> bool:
    """Whether a name in the folder of an output that is made is one that is used here."""
    return name in (BEGIN, PLAN, FINISH) or (name.startswith("part-") and name.endswith(".json") and "/" not in name)


def stray_uploads(place: StorePath, begun: Begun) -> list[str]:
    """End the uploads of the output's files, but those that were there before it was begun; the names of the files.

    Workers that came at the same time have begun some that no plan names.
    """
    keys = begun.keys(place)
    found = [(at, upload) for at, upload in uploads.uploads_of(place, keys) if upload not in begun.before]
    for at, upload in found:
        uploads.abort(at, upload)
    return sorted({keys[at.key] for at, _ in found})


def read_record(place: StorePath) -> dict[str, Any]:
    """The record of an output, which has that place; empty where there is none that can be read."""
    return json_or_empty((uploads.get(place) or b"")[: LARGEST_RECORD + 1], lenient=True)


def replaceable_in(place: StorePath, there: Mapping[str, int], record: StorePath, overwrite: bool) -> tuple[str, ...]:
    """The names of all objects that are at an output, which go.

    Args:
        place: the output, for the sentence.
        there: the sizes of the objects, by their names.
        record: the place of the output's record, which is `loratool.json` among them.
        overwrite: whether they may be replaced.

    Raises `UsageError` where there are any that may not be, or that the output's own record does not list.
    """
    if not there:
        return ()
    if not overwrite:
        raise UsageError(f"{place} already exists; pass --overwrite to replace it", hint="--overwrite")
    recorded = read_recorded(read_record(record))
    odd = {
        name: "not listed" if name not in recorded else "has another size than is listed"
        for name, size in there.items()
        if name != PROVENANCE and (name not in recorded or recorded[name].size != size)
    }
    if odd or PROVENANCE not in there:
        raise UsageError(
            f"{place}: contains objects that its own {PROVENANCE} does not list, so --overwrite does not replace it; "
            "remove them, or choose another OUT:",
            (f"{printable(name)}: {why}" for name, why in sorted(odd.items())),
        )
    return tuple(sorted(there))
