"""A stage's journal, and what it proves: that a folder is a stage of ours, and which of its entries are ours.

    {"loratool_stage": 2, "plan": "…", "inputs": {…}, "files": ["config.json", …]}     the head, written whole or not at all
    {"files": […]}       more names of files that the output will have, before the first of them is made
    {"finished": {"name": …, "size": …, "sha256": …, "changed": …, …}}                 a weight file on stable storage
    {"fetches": […]}     names of files that are fetched from the Hub into `fetched/`
    {"replaces": […]}    the old output's files, before it and the new one swap names
    {"becomes": 123}     the inode number of what becomes the output, before it gets that name

The head of a stage that many workers write to has "parts" besides: those have a folder of their own, with their records.

A line that a kill tore is passed over. A stage holds nothing but its journal and files that the journal names.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import StorageError, printable
from loratool.files.digests import Digest
from loratool.files.names import is_plain
from loratool.files.seen import Seen
from loratool.files.system import belongs_to, current_user, open_file
from loratool.files.untrusted import json_object

FORMAT = 2  # loratool 0.1.0 wrote journals without a number
HEAD = "loratool_stage"
JOURNAL = "journal"
NEW_JOURNAL = "journal.new"  # until it is whole
HEAD_DRAFT = re.compile(r"journal\.new(-[0-9a-f]{32})?")  # workers that begin a stage together have one each
PARTS = "parts"
PART_FILE = re.compile(r"(part|worker|finish)-[0-9a-f-]+\.json(\.[0-9a-f]{32}\.new)?")
MODEL = "model"
REPLACED = "replaced"  # the old output, whole, where names cannot be exchanged
PROBE = "probe"  # names that may not be possible are tried here; as long as "model", for paths may be too long
DISCARDED = "discarded"  # the same on its way out: half of it must never come back
FETCHED = "fetched"
FETCHED_FOLDER = re.compile(
    r"[0-9a-f]{32}(-file)?(/(?P<rest>.*))?", re.DOTALL
)  # one a file, as `fetching.pieces` makes it
LARGEST_JOURNAL = 256 << 20  # bytes
NAMING = ("files", "fetches", "replaces")  # lines that hold a list of names


@dataclass(frozen=True)
class FinishedShard:
    """An output file that is complete and on stable storage."""

    name: str
    digest: Digest
    seen: Seen  # while its bytes went by

    @property
    def size(self) -> int:
        """Bytes."""
        return self.digest.size

    def record(self) -> dict[str, Any]:
        """Its entry of a journal."""
        return {"name": self.name, **self.digest.record(), **self.seen.table()}

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> FinishedShard | None:
        digest = Digest.of_record(entry)
        match entry:
            case {"name": str(name)} if digest is not None and is_plain(name):
                return cls(name, digest, Seen.of_table(entry))
        return None


@dataclass
class Journal:
    """What a journal says."""

    plan: str  # the fingerprint of what is being made
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the files it is made of as they were, on this machine
    files: set[str] = field(default_factory=set)  # names in the output
    finished: dict[str, FinishedShard] = field(default_factory=dict)
    fetches: set[str] = field(default_factory=set)
    replaces: set[str] | None = None  # names in the old output, once it is being replaced
    becomes: int | None = None  # the inode number of what becomes the output, once that is complete
    parts: Mapping[str, Any] | None = None  # what all workers must agree on, where many write to the stage

    def head(self) -> bytes:
        """The first line of the journal."""
        table = {HEAD: FORMAT, "plan": self.plan, "inputs": self.inputs, "files": sorted(self.files)}
        table |= {} if self.parts is None else {"parts": self.parts}
        return (json.dumps(table) + "\n").encode()

    def take(self, line: Mapping[str, Any]) -> bool:
        """Add what a further line says; False where it is none of ours."""
        key, value = next(iter(line.items())) if len(line) == 1 else ("", None)
        if key == "finished" and isinstance(value, dict):
            if (shard := FinishedShard.of_record(value)) is None:
                return False
            self.finished[shard.name] = shard
            return True
        if key == "becomes" and isinstance(value, int):
            self.becomes = value
            return True
        if key not in NAMING or not isinstance(value, list) or not all(map(is_plain, value)):
            return False
        if key == "replaces" and self.replaces is None:
            self.replaces = set()
        getattr(self, key).update(value)
        return True

    def owns(self, path: str) -> bool:
        """Whether the file `path` of the stage is one that the journal names."""
        folder, _, name = path.partition("/")
        if folder == JOURNAL or HEAD_DRAFT.fullmatch(folder):
            return not name
        if folder == PARTS:
            return self.parts is not None and PART_FILE.fullmatch(name) is not None
        if folder == FETCHED:
            match = FETCHED_FOLDER.fullmatch(name)
            rest = (match["rest"] or "") if match and self.fetches else ""
            return rest.startswith(".cache/huggingface/") or Path(rest).name in {Path(f).name for f in self.fetches}
        return name in self.named(folder)

    def owns_folder(self, path: str) -> bool:
        """Whether the folder `path` of the stage is on the way to files that the journal names."""
        folder, _, name = path.partition("/")
        if folder == FETCHED:
            return bool(self.fetches) and (not name or FETCHED_FOLDER.fullmatch(name) is not None)
        if not name:
            return folder in (MODEL, PROBE, REPLACED, DISCARDED) or (folder == PARTS and self.parts is not None)
        return any(file.startswith(f"{name}/") for file in self.named(folder))

    def named(self, folder: str) -> set[str]:
        """The files that may be in a folder of the stage."""
        old = self.replaces or set()
        return {MODEL: self.files | old, PROBE: self.files, REPLACED: old, DISCARDED: old}.get(folder, set())


def read_journal(home: Path, owner: int) -> Journal | None:
    """The journal of a stage; None where none of ours is there."""
    try:
        descriptor = open_file(home / JOURNAL, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # missing, a link, a socket
            return None
        raise
    with open(descriptor, "rb") as stream:
        if why_odd(os.fstat(descriptor), owner) or os.fstat(descriptor).st_size > LARGEST_JOURNAL:
            return None
        lines = list(parsed(stream.read()))
    match lines:
        case [{"plan": str(plan), "inputs": dict(inputs), "files": list(files)} as head, *others] if (
            head.get(HEAD) == FORMAT
        ):
            parts = head.get("parts")
            journal = Journal(plan, inputs, parts=parts if isinstance(parts, dict) else None)
            return journal if journal.take({"files": files}) and all(map(journal.take, others)) else None
    return None


def parsed(raw: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a journal without those that are torn: half an object is no JSON."""
    for line in raw.splitlines():
        with suppress(ValueError):
            yield json_object(line, lenient=True)  # a name may be no UTF-8


def is_stage(folder: Path) -> bool:
    """Whether a folder holds a journal of ours, whoever it belongs to."""
    with suppress(OSError):
        return read_journal(folder, folder.stat().st_uid) is not None
    return False


def look(home: Path, owner: int | None = None) -> Journal | None:
    """The journal of a stage of ours; None where there is no stage, or one that was begun and no more.

    Nothing is changed. `owner` is the user to whom all of it must belong, who runs this process if none is given: a file
    system may give our files to another. Raises `ForeignError` where anything in the folder is not ours, naming all of it.
    """
    try:
        status = home.lstat()
    except FileNotFoundError:
        return None
    owner = current_user() if owner is None else owner
    if reason := why_odd(status, owner, folder=True):
        raise foreign(home, [f"{printable(home.name)}: {reason}"])
    found = list(walk(home))  # before the journal, which names files before they are made
    journal = read_journal(home, owner) if found else None
    if journal is None:
        found = list(walk(home))  # another process may have published or removed all of it just now
        if all(is_torn_head(home, path, owner) for path, _ in found):
            return None
        raise foreign(home, [f"{printable(path)}: {why}" for path, why in of_no_journal(home, found, owner)])
    check_owned(home, journal, found, owner)
    return journal


def check_owned(home: Path, journal: Journal, found: Iterable[tuple[str, os.stat_result]], owner: int) -> None:
    """Raise `ForeignError` naming every entry of a stage that is not ours."""
    told = ((path, why_foreign(journal, path, status, owner)) for path, status in found)
    if odd := [f"{printable(path)}: {reason}" for path, reason in told if reason]:
        raise foreign(home, odd)


class ForeignError(StorageError):
    """A stage holds what is not ours."""


def foreign(home: Path, odd: list[str]) -> ForeignError:
    """The refusal of a stage that holds what is not ours."""
    return ForeignError(
        f"{printable(home)}: contains files that loratool did not write, so nothing in it was changed; move them "
        "away, or choose another OUT:",
        odd,
    )


def of_no_journal(home: Path, found: list[tuple[str, os.stat_result]], owner: int) -> Iterator[tuple[str, str]]:
    """The entries of a folder without a journal of ours, with what is to be said of each."""
    for path, status in found:
        if path == JOURNAL:
            yield (
                path,
                why_odd(status, owner)
                or "not a journal of this release; if an earlier release left it, delete the folder",
            )
        elif "/" not in path and not is_torn_head(home, path, owner):
            yield path, "not listed in a loratool journal"


def why_foreign(journal: Journal, path: str, status: os.stat_result, owner: int) -> str:
    """Empty where an entry of the stage is ours; else the reason it is not."""
    folder = stat.S_ISDIR(status.st_mode)
    if reason := why_odd(status, owner, folder):
        return reason
    return "" if (journal.owns_folder(path) if folder else journal.owns(path)) else "is not in the journal"


def why_odd(status: os.stat_result, owner: int, folder: bool = False) -> str:
    """Empty for a regular file, or a folder, of that user; else what it is."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        return f"is not a {'folder' if folder else 'regular file'}"
    return "" if belongs_to(status, owner) else f"belongs to another user ({status.st_uid})"


def is_torn_head(home: Path, path: str, owner: int) -> bool:
    """Whether an entry is the beginning of a journal that a kill kept from being finished."""
    start = f'{{"{HEAD}": {FORMAT}, '.encode()
    try:
        if not HEAD_DRAFT.fullmatch(path) or why_odd((home / path).lstat(), owner):
            return False
        with open(home / path, "rb") as stream:
            raw = stream.read(len(start))
    except FileNotFoundError:  # another worker has begun the stage just now
        return True
    return raw == start[: len(raw)]


def walk(home: Path, inside: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below a folder, no link followed: its path, with slashes, and its status."""
    try:
        entries = sorted(os.scandir(home / inside), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # gone meanwhile, or a folder that belongs to somebody else
    for entry in entries:
        path = f"{inside}{entry.name}"
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            yield from walk(home, f"{path}/")
