"""Is a folder still what loratool wrote? Every file that its own `loratool.json` lists is read and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.arguments import Progress
from loratool.errors import InputError, LoratoolError, VerificationError, printable
from loratool.files.digests import (
    Digest,
    Finder,
    Reference,
    read_recorded,
    sha256_of,
    unproven,
    why_unlike,
)
from loratool.files.folders import INDEX_SUFFIX, PROVENANCE, folder_and_name, record_for, walk
from loratool.files.hub_cache import find_blob
from loratool.files.untrusted import LARGEST_RECORD, read_json
from loratool.lazy import installed
from loratool.notes import Note
from loratool.templates import some

# What a model or an adapter computes depends on these; all others are files that people edit.
DECISIVE = ("*.safetensors", "*.gguf", f"*{INDEX_SUFFIX}", "config.json", "adapter_config.json")
MOST_NAMED = 5  # files that a note repeats
WAY_OUT = f"make it again, or, if the change was intended, delete {PROVENANCE}, which no longer describes it"


def versions() -> dict[str, str]:
    """The releases that a record names: those on which the bytes of an output may depend."""
    return {"loratool": __version__, "torch": installed("torch")}


@dataclass(frozen=True)
class Comparison:
    """How a folder differs from its record."""

    problems: tuple[str, ...] = ()  # each names a file
    notes: tuple[Note, ...] = ()


def listed_files(folder: Path) -> dict[str, Digest]:
    """The files that the record of a folder lists."""
    return read_recorded(read_json(record_for(folder), LARGEST_RECORD))


def why_other_file(folder: Path, name: str) -> str:
    """Empty where a file that the record of a folder lists is what it should be; else what is wrong with it."""
    return why_other(folder / name, listed_files(folder)[name], lambda reference: sound_blob(reference.sha256))


def compare(
    place: Path,
    reasons: Mapping[str, str] | None = None,
    in_order: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Every listed file of a folder, or one file, held to its digest; without a `loratool.json` there is nothing to say.

    A file that decides what is computed, and is missing or another than was written, is a problem; of any other it is a
    note, and so are files that the record does not list. `reasons` are what `why_other_file` says of every file, where that is known; `in_order` is as for `why_unlike`.
    `progress` is called with (bytes done, total bytes) after every file.
    """
    record = record_for(place)
    if not record.is_file():
        return Comparison()
    try:
        table = read_json(record, LARGEST_RECORD)
    except LoratoolError as error:
        return Comparison((f"{PROVENANCE}: cannot be read, so the files were not checked ({error.message})",))
    (folder, only), listed = folder_and_name(place), read_recorded(table)
    if only:
        listed = {name: digest for name, digest in listed.items() if name == only}
    blobs = cache(sound_blob)

    def find(reference: Reference) -> Path | None:
        return blobs(reference.sha256)

    problems: list[str] = []
    notes = list(notes_of(folder, table, listed, only))
    sizes = {name: path.stat().st_size if (path := folder / name).is_file() else 0 for name in listed}
    done = 0
    for name, digest in sorted(listed.items()):
        notes += [*unproven_notes(name, digest, find), *copied_notes(name, digest)]
        reason = why_other(folder / name, digest, find, in_order) if reasons is None else reasons.get(name, "")
        done += sizes[name]
        if progress is not None:
            progress(done, sum(sizes.values()))
        if not reason:
            continue
        if is_decisive(name):
            problems.append(f"{printable(name)}: {reason}")
        else:
            notes.append(Note("edited-since", f"{printable(name)} {reason}: it was edited or damaged"))
    return Comparison(tuple(problems), tuple(notes))


def check(folder: Path) -> tuple[Note, ...]:
    """The notes of a comparison; raises `VerificationError` naming every file with a problem.

    Files are read in order, as `why_unlike` explains.
    """
    found = compare(folder, in_order=True)
    if found.problems:
        raise VerificationError(
            f"{printable(folder)}: differs from what {PROVENANCE} says was written; {WAY_OUT}:", found.problems
        )
    return found.notes


def is_decisive(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in DECISIVE)


def why_other(path: Path, digest: Digest, find: Finder, in_order: bool = False) -> str:
    """Empty where a file holds what was written; else what is wrong with it."""
    try:
        return why_unlike(path, digest, find, in_order)
    except InputError:
        return "is not a regular file, or changed while it was being read"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def sound_blob(sha256: str) -> Path | None:
    """A file of the Hub's cache that has this SHA-256, all of which is read."""
    with suppress(OSError, InputError):
        path = find_blob(sha256)
        return path if path and sha256_of(path) == sha256 else None
    return None


def unproven_notes(name: str, digest: Digest, find: Finder) -> Iterator[Note]:
    """A note where tensors are recorded as bytes of a base that is not there to be compared with."""
    if unknown := unproven(digest, find):
        bases = sorted({f"{each.file} with SHA-256 {each.sha256[:16]}…" for each in unknown.values()})
        yield Note(
            "not-checked",
            f"{printable(name)}: {len(unknown)} tensors are recorded as copies from {printable(', '.join(bases))}; "
            "they were not checked, because that file is not in the Hub's cache",
        )


def copied_notes(name: str, digest: Digest) -> Iterator[Note]:
    """A note where a store copied bytes that loratool has never read before."""
    if digest.copies:
        size = sum(copy.stop - copy.start for copy in digest.copies)
        told = sum(copy.stop - copy.start for copy in digest.copies if copy.md5)
        sources = sorted({f"{copy.source.file} (version {copy.source.version})" for copy in digest.copies})
        yield Note(
            "copied-in-store",
            f"{printable(name)}: {size} bytes were copied inside a store from {printable(', '.join(sources))}; {told} of "
            "them were read now and compared with the MD5 that the store gave when it copied them",
        )


def notes_of(folder: Path, table: Mapping[str, Any], listed: Mapping[str, Digest], only: str) -> Iterator[Note]:
    """What the record does not say."""
    if not isinstance(table.get("files"), Mapping):
        lists = "the weights only" if listed else "no files"
        text = f"{PROVENANCE} lists {lists}, as written by loratool 0.1.0; other files were not checked"
        yield Note("record-is-partial", text)
    elif not only and (unlisted := [n for n in sorted(walk(folder, [])) if n not in listed and n != PROVENANCE]):
        yield Note(
            "not-in-record", f"{PROVENANCE} does not list {some(unlisted, MOST_NAMED)}; added later, so not checked"
        )
