"""What tells that a file still holds what was written: an entry of a stage's journal and of `loratool.json`.

Everything else takes a `Digest` as it comes: how one is made, stored and compared is known here alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratool.errors import InputError, printable
from loratool.files.inputs import open_regular
from loratool.files.names import has_other_parts
from loratool.files.safefile import Identity

PIECE = 1 << 20  # bytes that are read at a time
HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Digest:
    """The digest of one file: its size in bytes and the SHA-256 of all of it. `str` gives the latter in hexadecimal."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return self.sha256

    def record(self) -> dict[str, Any]:
        """The entry of this file in a journal or in `loratool.json`."""
        return {"size": self.size, "sha256": self.sha256}

    @classmethod
    def of_record(cls, entry: object) -> Digest | None:
        """The digest that such an entry holds; None where it holds none."""
        if not isinstance(entry, Mapping):
            return None
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            return None
        return cls(size, sha256) if len(sha256) == 64 and HEX.issuperset(sha256) else None

    def has_sha256(self, sha256: str) -> bool:
        """Whether the file's SHA-256, as the Hub names it, is `sha256`."""
        return self.sha256 == sha256


class Digester:
    """The digest of a file whose bytes come one part after the other."""

    def __init__(self) -> None:
        self.state = hashlib.sha256()
        self.size = 0

    def update(self, part: bytes | memoryview) -> None:
        self.state.update(part)
        self.size += len(part)

    def digest(self) -> Digest:
        return Digest(self.size, self.state.hexdigest())


def parts_of(path: Path) -> Iterator[bytes]:
    """All bytes of a file in parts. Raises `InputError` where it is not a regular file, or changes meanwhile."""
    with open(open_regular(path), "rb", buffering=0) as stream:
        before = Identity.of(os.fstat(stream.fileno()))
        while part := stream.read(PIECE):
            yield part
        if Identity.of(os.fstat(stream.fileno())) != before or Identity.of(path.stat()) != before:
            raise InputError(f"{printable(path)}: the file changed while it was being read; start again")


def digest_of(path: Path) -> Digest:
    """The digest of a file, all of which is read. Raises `InputError` where it is not a regular file, or changes
    meanwhile.
    """
    digester = Digester()
    for part in parts_of(path):
        digester.update(part)
    return digester.digest()


def digest_of_bytes(content: bytes) -> Digest:
    digester = Digester()
    digester.update(content)
    return digester.digest()


def recorded(files: Mapping[str, Digest]) -> dict[str, dict[str, Any]]:
    """The entry "files" of `loratool.json`: every file that was written, by its name relative to the folder."""
    return {name: digest.record() for name, digest in sorted(files.items())}


def read_recorded(provenance: Mapping[str, Any]) -> dict[str, Digest]:
    """The files that a `loratool.json` lists, which anybody may have written: entries that are none are passed over.

    loratool 0.1.0 listed the weights of merged models only, as "shards".
    """
    found: dict[str, Digest] = {}
    for key in ("shards", "files"):
        table = provenance.get(key)
        for name, entry in table.items() if isinstance(table, Mapping) else ():
            if is_plain(name) and (digest := Digest.of_record(entry)) is not None:
                found[name] = digest
    return found


def is_plain(name: object) -> bool:
    """Whether a name is a relative path that stays in its folder, spelled in the one usual way."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    if has_other_parts(name):
        return False
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name != "."


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: how provenance names an input, and the Hub a file."""
    state = hashlib.sha256()
    for part in parts_of(path):
        state.update(part)
    return state.hexdigest()


def why_unlike(path: Path, wanted: Digest) -> str:
    """Empty where a file holds what was written; else what is wrong. Its size is looked at first, which costs nothing."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != wanted.size:
        return f"has {size} bytes, but {wanted.size} were written"
    return "" if digest_of(path) == wanted else "differs from the bytes that were written"
