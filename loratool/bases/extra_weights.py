"""Trained weights that lie in an adapter's folder and are not part of the adapter.

Each is merged where that is asked for, carried over where it is a module of its own, left out where that is allowed,
and otherwise a reason to stop: dropped in silence, the merged model would not be what was trained.
"""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import WRITTEN
from loratool.adapters.weight_files import PICKLES, WeightFile, fates
from loratool.arguments import PathLike
from loratool.bases.binding import Bound
from loratool.errors import InputError, LoratoolError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.containers import conversion
from loratool.notes import Note
from loratool.options.described import local_word

ALSO_LOAD, IGNORE = "--also-load", "--ignore-files"


@dataclass
class Extras:
    """What becomes of the files in the folders of some adapters."""

    loaded: list[Adapter] = field(default_factory=list)  # to be merged as adapters are
    strengths: list[float] = field(default_factory=list)  # theirs: those of the adapters they belong to
    notes: list[Note] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what would be lost


def extras_of(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    binder: Callable[[Adapter, Checkpoint], Bound],
    also_load: Sequence[str],
    ignore: Sequence[str],
) -> Extras:
    """Account for every file of weights in the adapters' folders.

    Args:
        base: the model that is merged into.
        adapters: whose folders were looked through when they were read.
        strengths: of the adapters.
        binder: finds the places of an adapter's tensors in the base.
        also_load: files to merge: names in an adapter's folder, or paths.
        ignore: names of files to leave out, or patterns of them as in `fnmatch`.

    Raises:
        UsageError: a name is that of no file.
        InputError: a file to merge is no safetensors file of whole tensors.
    """
    found = Extras()
    taken: dict[int, set[str]] = {number: set() for number in range(len(adapters))}
    for wanted in also_load:
        number, path, name = find(adapters, wanted)
        taken[number].add(name)
        found.loaded.append(load(path, adapters[number]))
        found.strengths.append(strengths[number])
    unmatched = set(ignore)
    first = next((adapter for adapter in adapters if any(file.kind == "module" for file in adapter.beside)), None)
    for number, adapter in enumerate(adapters):
        patterns = {file.name: {each for each in ignore if matches(file.name, each)} for file in adapter.beside}
        unmatched -= set().union(*patterns.values())
        ignored = {name for name, own in patterns.items() if own}
        modules = [file.name for file in adapter.beside if file.kind == "module" and is_alike(file, adapter, first)]
        settled = taken[number] | ignored | set(modules)
        lost = [file for file in adapter.beside if file.counts and file.name not in settled]
        found.problems += [f"{adapter.name}: {told(file, adapter, base, binder)}" for file in lost]
        notes = fates(adapter.beside, merged=taken[number], carried=set(modules) - ignored, ignored=ignored)
        found.notes += [note.under(adapter.name) for note in notes]
    if unmatched:
        names = ", ".join(printable(file.name) for adapter in adapters for file in adapter.beside) or "none"
        raise UsageError(
            f"{IGNORE} {printable(min(unmatched))} matches no weight file in the adapters' folders (found: {names})"
        )
    return found


def is_alike(file: WeightFile, adapter: Adapter, first: Adapter | None) -> bool:
    """Whether a module of sentence-transformers is carried over, being the first adapter's or equal to it."""
    if first is None or first is adapter:
        return True
    other = first.folder / file.name
    return other.is_file() and filecmp.cmp(adapter.folder / file.name, other, shallow=False)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is, or fits, a path in an adapter's folder or its last part."""
    last = name.rstrip("/").rpartition("/")[2]
    return pattern.rstrip("/") in (name.rstrip("/"), last) or fnmatchcase(name, pattern) or fnmatchcase(last, pattern)


def find(adapters: Sequence[Adapter], wanted: PathLike) -> tuple[int, Path, str]:
    """The adapter that a file to merge belongs to, its path, and its name there (empty for a file from elsewhere)."""
    text = os.fspath(wanted)
    for number, adapter in enumerate(adapters):
        for file in adapter.beside:
            path = adapter.folder / file.name
            if text in (file.name, os.path.basename(file.name)) or (
                os.path.exists(text) and path.exists() and os.path.samefile(text, path)
            ):
                return number, path, file.name
    if not os.path.exists(text):
        names = ", ".join(printable(f.name) for a in adapters for f in a.beside if f.is_safetensors) or "none"
        raise UsageError(
            f"{ALSO_LOAD} {printable(text)}: no such file here or in the adapters' folders (found: {names})"
        )
    return 0, Path(text), ""


def name_beside(adapters: Sequence[Adapter], wanted: PathLike) -> str:
    """A file to merge as a record names it: by its name in an adapter's folder, or by its last name from elsewhere."""
    return find(adapters, wanted)[2] or local_word(wanted)


def load(path: Path, owner: Adapter) -> Adapter:
    """A file to merge, as an adapter whose every tensor replaces the base's."""
    if path.suffix in PICKLES:
        raise InputError(f"{printable(path)}: loratool never loads pickled weights; {conversion(path)}")
    return WRITTEN.read_saved(path, owner)


def told(file: WeightFile, adapter: Adapter, base: Checkpoint, binder: Callable[[Adapter, Checkpoint], Bound]) -> str:
    """A file that would be lost, and what can be done about it."""
    start = f"{file} was trained along with the adapter"
    leave = f"pass {IGNORE} {printable(file.name)} to leave it out"
    if file.name.endswith(PICKLES):
        safe = printable(Path(file.name).with_suffix(".safetensors"))
        way = conversion(adapter.folder / file.name)
        return f"{start}; {leave}, or convert it and pass {ALSO_LOAD} {safe}: {way}"
    if file.is_safetensors and (why := why_not_merged(file, adapter, base, binder)):
        return f"{start}: {why}; {leave}"
    if file.is_safetensors:
        return f"{start}; pass {ALSO_LOAD} {printable(file.name)} to merge it, or {leave}"
    return f"{start}; {leave}"


def why_not_merged(
    file: WeightFile, adapter: Adapter, base: Checkpoint, binder: Callable[[Adapter, Checkpoint], Bound]
) -> str:
    """Empty where every tensor of a file has its place in the base; else what keeps it from being merged."""
    try:
        loaded = WRITTEN.read_saved(adapter.folder / file.name, adapter)
    except LoratoolError as error:
        return error.message.removeprefix(f"{printable(adapter.folder / file.name)}: ")
    lacking = binder(dataclasses.replace(loaded, notes=()), base).problems
    return f"the base has no weight for {printable(next(iter(lacking)))}" if lacking else ""
