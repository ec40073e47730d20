"""Finds the inputs that a record names: where they were, on the Hub, or whatever in some folders has their digests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.errors import HubError, InputError, LoratoolError, printable
from loratool.fetching import local
from loratool.fetching.stores import look_up
from loratool.files.digests import HASHES, OTHER, Digest, digest_of_part, is_hex, sha256_of, why_unlike
from loratool.files.hub_cache import sha256_of_link
from loratool.files.hub_names import parse
from loratool.files.names import is_plain
from loratool.files.system import link_or_copy
from loratool.files.weight_formats import read_weight_file
from loratool.provenance.record import sound_blob
from loratool.stores.names import is_in_store, parse_store

DEEPEST = 6  # folders below one that is searched
MOST_FILES = 20_000  # of one that is searched
WEIGHTS = (".safetensors", ".gguf")
LARGEST_COPY = 4 << 30  # bytes of a file that is given another name for a run; a link is told of in the new record


@dataclass(frozen=True)
class Wanted:
    """An input as a record names it."""

    word: str  # the operand
    role: str
    entry: Mapping[str, Any]  # of the record

    @property
    def name(self) -> str:
        """The last name of its place."""
        return self.word.removeprefix("./").rpartition("/")[2]

    @property
    def on_hub(self) -> bool:
        return not self.word.startswith("./") and parse(self.word) is not None

    @cached_property
    def files(self) -> dict[str, Mapping[str, Any]]:
        """Name → what is known of each file: its size, and digests."""
        files, plain = self.entry.get("files"), self.entry.get("sha256")
        found = {n: f for n, f in files.items() if isinstance(f, Mapping)} if isinstance(files, Mapping) else {}
        found |= {n: {"sha256": s} for n, s in plain.items()} if isinstance(plain, Mapping) else {}
        return {name: facts for name, facts in found.items() if is_plain(name)}

    @property
    def is_file(self) -> bool:
        """Whether the operand is one of the files, and not their folder."""
        return self.name in self.files and Path(self.name).suffix in WEIGHTS


@dataclass(frozen=True)
class Found:
    """Where an input is."""

    path: str  # to be given to a command
    how: str  # in a few words


@dataclass
class Search:
    """The places where inputs may be."""

    near: Sequence[Path]  # folders in which they may have been
    folders: Sequence[Path]  # all of which is searched
    scratch: Path  # where files that lie elsewhere under another name get theirs

    def find(self, wanted: Wanted) -> Found:
        """Where an input is, with the digests of the record. Raises `InputError` where it is nowhere."""
        if not wanted.files:
            raise InputError(f"{printable(wanted.word)}: the record has no digests of it")
        tried: list[str] = []
        for path in self.places(wanted):
            reason = self.why_other(path, wanted)
            if not reason:
                return Found(os.fspath(path), f"in {printable(path.parent)}")
            tried.append(f"{printable(path)}: {reason}")
        if wanted.on_hub:
            try:
                path = local(wanted.word, "adapter" if wanted.role == "adapter" else "model")
                if not (reason := self.why_other(path, wanted)):
                    return Found(os.fspath(path), "from the Hub")
                tried.append(f"{printable(wanted.word)}: {reason}")
            except HubError as error:
                tried.append(error.message)
        if (made := self.by_content(wanted)) is not None:
            return made
        raise InputError(f"{printable(wanted.word)}: not found with the digests of the record", tried)

    def places(self, wanted: Wanted) -> Iterator[Path]:
        """Where it may lie under its own name; what is not there is passed over."""
        if not wanted.on_hub:
            yield from (near / wanted.name for near in self.near if os.path.lexists(near / wanted.name))
        for folder in self.folders:
            inner = (Path(at) for at, _, _ in walked(folder))
            yield from (p / wanted.name for p in inner if os.path.lexists(p / wanted.name))
            if folder.name == wanted.name:
                yield folder

    def why_other(self, path: Path, wanted: Wanted) -> str:
        """Empty where a place holds the input of the record; else what is another."""
        home = path if path.is_dir() else path.parent
        if wanted.is_file and path.is_dir():
            return "is a folder"
        for name, facts in wanted.files.items():
            if reason := why_unlike_facts(home / name, facts):
                return f"{printable(name)} {reason}"
        return ""

    def by_content(self, wanted: Wanted) -> Found | None:
        """The input put together of files that have its digests, under whatever names they lie."""
        sources: dict[str, Path] = {}
        for name, facts in wanted.files.items():
            path = next((each for each in self.candidates(name, facts) if not why_unlike_facts(each, facts)), None)
            if path is None:
                return None
            sources[name] = path
        homes = {path.parent for name, path in sources.items() if path.name == name}
        if len(homes) == 1 and len(sources) == sum(path.name == name for name, path in sources.items()):
            home = homes.pop()  # a whole folder under another name: what lies beside counts too
            sources = {n: home / n for n in (e.name for e in os.scandir(home) if e.is_file())} | sources
        place = self.scratch / wanted.name
        folder = place.parent if wanted.is_file else place
        for name, path in sources.items():
            put(path, folder / name)
        return Found(os.fspath(place), f"in {printable(next(iter(sources.values())).parent)}, under another name")

    def candidates(self, name: str, facts: Mapping[str, Any]) -> Iterator[Path]:
        """Files that may be one of the record: of the same kind, and of its size where that is known."""
        for folder in self.folders:
            for at, _, names in walked(folder):
                for each in sorted(names):
                    path = Path(at, each)
                    if path.suffix == Path(name).suffix and facts.get("size") in (None, size_of(path)):
                        yield path


def here(place: Path) -> Path:
    """Where an output can be read: itself, or the local folder that stands for it where it is in a store.

    Raises as `fetching.local` does for a place in a store at which there is nothing.
    """
    return local(place, "any") if is_in_store(place) else place


def is_there(place: Path) -> bool:
    """Whether an output is there, in a store or on this disk, whoever made it."""
    if not is_in_store(place):
        return os.path.lexists(place)
    stored = parse_store(place)
    try:
        return stored is not None and bool(look_up(stored))
    except InputError:  # nothing, or an unfinished merge
        return False


def walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` of a folder, as far as it is searched."""
    seen = 0
    for at, folders, names in os.walk(folder):
        if len(Path(at).relative_to(folder).parts) >= DEEPEST:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield at, folders, names
        if (seen := seen + len(names)) > MOST_FILES:
            return


def size_of(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return -1


def why_unlike_facts(path: Path, facts: Mapping[str, Any]) -> str:
    """Empty where a file is the one that a record tells of, by all that it tells; else what is another."""
    try:
        if not path.is_file():
            return "is missing"
        size, sha256, header = facts.get("size"), facts.get("sha256"), facts.get("header")
        if isinstance(size, int) and size != size_of(path):
            return f"has {size_of(path)} bytes, not {size}"
        if is_hex(sha256) and sha256_of_link(path) == sha256:
            return ""  # the Hub's cache names its files by it
        if (digest := Digest.of_record(facts)) is not None:
            return why_unlike(path, digest, lambda reference: sound_blob(reference.sha256))
        if is_hex(sha256):
            return "" if sha256_of(path) == sha256 else OTHER
        if is_hex(header) and (begin := HASHES.get(str(facts.get("function")))) is not None:
            return "" if digest_of_part(read_weight_file(path).layout.header, begin) == header else "has another header"
        return "has no digest in the record"
    except LoratoolError as error:
        return f"cannot be read ({error.message})"


def put(path: Path, place: Path) -> None:
    """The same file at another place: a copy, or a link to one that is large."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if size_of(path) <= LARGEST_COPY:
        shutil.copyfile(path, place)
    else:
        link_or_copy(path, place)
