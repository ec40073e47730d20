"""Operands that name a place in an object store become local folders, in which weights are stand-ins.

As of a repository of the Hub, an outline of empty files decides what is needed (`fetching.outline`). Small files come
whole, and so do the weights of adapters, all of which is read, more than once. Of a model's weights only headers come;
their tensors are read from where they are, when they are needed. The folder goes when the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from loratool.adapters.formats import is_adapter
from loratool.errors import InputError, StorageError, printable, shown_as
from loratool.fetching.answers import why_no_name
from loratool.fetching.outline import Role, needed, small_files
from loratool.files import stand_ins
from loratool.files.folders import PROVENANCE, holds_weights, largest_of, sidecar_of
from loratool.files.source import read_pieces
from loratool.files.system import free_space, shell_word
from loratool.files.untrusted import check_bound
from loratool.files.weight_formats import distant_header
from loratool.shown import size
from loratool.stores import uploads
from loratool.stores.begun import BEGIN, Begun
from loratool.stores.client import connection
from loratool.stores.names import FOLDER, StorePath
from loratool.stores.objects import StoredObject, listed

LEAD = 1 << 16  # bytes of a header that come with the first request


@dataclass
class Folder:
    """A folder of this disk that stands for one in a store, in the state in which it was listed."""

    root: Path
    objects: Mapping[str, StoredObject]  # by their names in it

    def copy(self, names: Iterable[str]) -> None:
        """Bring whole objects, a few at a time. Raises `StorageError` where they have no room."""
        every = [name for name in names if os.fspath(self.root / name) not in stand_ins.copied]
        total, free = sum(self.objects[name].size for name in every), free_space(self.root)
        if free is not None and total > free:
            raise StorageError(
                f"{printable(self.root)}: needs {size(total)} in {tempfile.gettempdir()}, but only {size(free)} is free"
            )
        list(connection().pool.map(self.copy_one, every))

    def copy_one(self, name: str) -> None:
        there, path = self.objects[name], self.root / name
        source = there.source()
        source.expect(0, there.size)
        with open(path, "wb") as stream:
            stream.writelines(read_pieces(source, 0, there.size))
        self.mark(name)

    def put(self, name: str) -> None:
        """Bring a small file; raises `InputError` where it is too large to be what it is called."""
        there = self.objects[name]
        check_bound(printable(str(there.place)), there.size, largest_of(name))
        (self.root / name).write_bytes(there.read(0, there.size))
        self.mark(name)

    def mark(self, name: str) -> None:
        """Let a copy tell what it is a copy of, and when that was written."""
        there, path = self.objects[name], self.root / name
        stand_ins.standing.pop(os.fspath(path), None)
        stand_ins.copied[os.fspath(path)] = there.identity
        os.utime(path, ns=(there.modified, there.modified))

    def put_headers(self, names: Iterable[str]) -> None:
        """Let weight files stand for their objects, with their headers: each takes one request, or two."""
        list(connection().pool.map(self.put_header, names))

    def put_header(self, name: str) -> None:
        there, path = self.objects[name], self.root / name
        path.write_bytes(distant_header(path, there.size, there.read, LEAD))
        os.truncate(path, there.size)
        os.utime(path, ns=(there.modified, there.modified))
        stand_ins.standing[os.fspath(path)] = there

    def keep(self, names: Collection[str]) -> None:
        """Remove the outline of everything else."""
        for name in self.objects:
            if name not in names:
                (self.root / name).unlink(missing_ok=True)
        for folder, below, files in os.walk(self.root, topdown=False):
            if not below and not files and folder != os.fspath(self.root):
                os.rmdir(folder)


places: dict[tuple[object, ...], Path] = {}  # what was made already


def brought(place: StorePath, role: Role | None, more: Sequence[str] = ()) -> Path:
    """The folder or file that stands for a place in a store.

    Args:
        place: what was asked for.
        role: what it will be read as, so that the rest is not there; None for headers and all names.
        more: patterns of other files that are wanted, as in `fnmatch`.

    Raises:
        InputError: there is no such thing, or it is malformed.
        StoreError: the store cannot be reached, or refuses.
        StorageError: there is no room for an adapter.
    """
    root, inside, objects = look_up(place)
    wanted = frozenset(name for name in objects for pattern in more if fnmatch(name, pattern))
    return made_once(root, inside, objects, (str(place), role, wanted), partial(settle, role=role, more=wanted))


def names_below(place: StorePath) -> Path | None:
    """A folder of empty files with the names of what is below a place in a store; None for a place that is no prefix.

    Raises as `brought` does.
    """
    root, inside, objects = look_up(place)
    return None if inside else made_once(root, "", objects, (str(place), "names"), lambda _folder, _location: None)


def made_once(
    root: StorePath,
    inside: str,
    objects: Mapping[str, StoredObject],
    use: tuple[object, ...],
    settle: Callable[[Folder, Path], None],
) -> Path:
    """The place `inside` a folder for some objects, settled for a use once for each state of these."""
    key = (*use, frozenset((name, there.state) for name, there in objects.items()))
    if key not in places or not places[key].exists():
        folder = outlined(root, objects)
        location = folder.root / inside if inside else folder.root
        settle(folder, location)
        places[key] = location
    return places[key]


def look_up(place: StorePath) -> tuple[StorePath, str, dict[str, StoredObject]]:
    """The folder that a place is, or is in; its name there, empty for all of it; and the objects."""
    single = place.name.endswith((".safetensors", ".gguf", ".json"))
    if not single and (objects := plain(listed(place))):
        return place, "", objects
    beside = plain(listed(place.parent, beside=True)) if place.key else {}
    if place.name in beside:
        return place.parent, place.name, beside
    if single and (objects := plain(listed(place))):
        return place, "", objects
    raise InputError(f"{place}: no such object, and none below it")


def plain(objects: Mapping[str, StoredObject]) -> dict[str, StoredObject]:
    """The objects whose names can be those of files in a folder; a name that is a folder's too is none of a file.

    Raises `InputError` where they are what an unfinished output has left.
    """
    if f"{FOLDER}/{BEGIN}" in objects and PROVENANCE not in objects:
        home = objects[f"{FOLDER}/{BEGIN}"].place.parent
        at, begun = home.parent, Begun.of_bytes(uploads.get(home / BEGIN) or b"")
        raise InputError(
            f"{at}: contains an unfinished {begun.command if begun else 'output'}; run the same command again to finish it, or "
            f"`loratool merge -o {shell_word(str(at))} --abort` to remove it"
        )
    own = f"{FOLDER}/"
    named = {name: there for name, there in objects.items() if not (why_no_name(name) or name.startswith(own))}
    parents = {"/".join(parts[:n]) for name in named for parts in [name.split("/")] for n in range(1, len(parts))}
    return {name: there for name, there in named.items() if name not in parents}


def outlined(root: StorePath, objects: Mapping[str, StoredObject]) -> Folder:
    """A new folder with an empty file for each object."""
    home = tempfile.TemporaryDirectory(prefix="loratool-", ignore_cleanup_errors=True)
    stand_ins.homes.append(home)  # it goes with the process
    path = Path(os.path.realpath(home.name), root.name)
    path.mkdir()
    for name in objects:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    shown_as[os.fspath(path)] = str(root)
    return Folder(path, objects)


def settle(folder: Folder, location: Path, role: Role | None, more: Set[str]) -> None:
    """Bring what a folder is read for, and `more` files; leave nothing else in it but for `role` None."""
    small = [Path(os.path.relpath(location.parent / name, folder.root)).as_posix() for name in small_files(location)]
    records = [name for name in (PROVENANCE, sidecar_of(location).name) if name in folder.objects]
    for name in dict.fromkeys([*small, *records]):
        folder.put(name)
    if role is None:
        if holds_weights(location):
            folder.put_headers(needed(folder.root, location, "any").weights)
        return
    found = needed(folder.root, location, role)
    weights = {name for name in more if name.endswith((".safetensors", ".gguf"))}
    folder.put_headers(dict.fromkeys([*found.weights, *weights]))
    folder.copy(more - weights - {*found.names})
    if role == "adapter" or is_adapter(location):
        folder.copy(found.names)
    else:
        folder.copy(found.others)
    folder.keep({*found.names, *records, *more})
