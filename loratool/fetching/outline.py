"""A repository without its content: a folder of empty files, on which the rules for local folders decide what is needed.

Headers and small JSON files are put into it by range requests. What it is for is told from headers alone, or is to
find out which files are worth a download. The client's `get_safetensors_metadata` believes what a server says of sizes,
and leaves no file that those rules could look at.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from loratool.adapters.formats import CONFIGS, FORMATS, format_at, has_adapter
from loratool.bases.packing_settings import TWINS
from loratool.errors import HubError, InputError, printable, shown_as
from loratool.fetching.answers import RemoteFile, check_range, commit_of, files_of
from loratool.fetching.client import api, asking, patiently
from loratool.fetching.ranges import RangedFile
from loratool.files.checkpoint import choose_index, choose_shards, gguf_alone, read_index
from loratool.files.folders import INDEX_SUFFIX, MODEL_INDEX, PROVENANCE, largest_of, sort_side_files
from loratool.files.gguf_splits import names_of_parts
from loratool.files.hub_names import HubPath, way_inside
from loratool.files.pipelines import files_of as files_of_pipeline, is_pipeline
from loratool.files.small_tensors import READERS
from loratool.files.stand_ins import standing
from loratool.files.untrusted import check_bound
from loratool.files.weight_formats import distant_header
from loratool.lazy import hub, hub_utils

Role = Literal["model", "adapter", "any"]
FIRST_READ = 8192  # bytes: a small header comes with the first request
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """One commit of a repository."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Needed:
    """The files that a command will read, by their names in the repository."""

    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.weights, *self.others)


def look_up(place: HubPath) -> Remote:
    """The commit that a revision is now, and its files. Raises `HubError`."""
    with asking(place.repo, place.revision):
        info: Any = patiently(lambda: api().model_info(place.repo, revision=place.revision, files_metadata=True))
    entries = [(s.rfilename, s.size, s.blob_id, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()]
    return Remote(place.repo, commit_of(place.repo, info.sha), files_of(place.repo, entries))


@contextmanager
def outlined(remote: Remote, place: HubPath) -> Iterator[Path]:
    """The outline's folder or file for `place`, for as long as the block runs. Its errors name the Hub's path."""
    with tempfile.TemporaryDirectory(prefix="loratool-") as home:
        # the names of a cache's folders, so that whoever asks a path where it comes from is told
        root = Path(os.path.realpath(home), f"models--{remote.repo.replace('/', '--')}", "snapshots", remote.commit)
        for name in remote.files:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        location = root / place.inside if place.inside else root
        if not location.exists():
            raise InputError(f"{printable(place)}: no such folder or file in the repository")
        shown_as[str(root)] = str(place)
        try:
            for name in small_files(location):
                (location.parent / name).write_bytes(read_small(remote, (location.parent / name).relative_to(root)))
            yield location
        finally:
            del shown_as[str(root)]


def small_files(location: Path) -> Iterator[str]:
    """What decides what else is needed, as paths from the parent of `location`: configs and indexes."""
    folder = location if location.is_dir() else location.parent
    inside = [found for name in CONFIGS for found in folder.glob(f"*/{name}")]
    if is_pipeline(folder):
        yield (folder / MODEL_INDEX).relative_to(location.parent).as_posix()
        inside += [*folder.glob("*/config.json"), *folder.glob("*/*.index*.json")]
    for path in (*folder.iterdir(), *inside):
        if (
            (path.parent != folder and is_pipeline(folder))
            or path.name in ("config.json", *CONFIGS, *TWINS)
            or path.name.endswith(INDEX_SUFFIX)
        ):
            yield path.relative_to(location.parent).as_posix()


def needed(root: Path, location: Path, role: Role) -> Needed:
    """The files of the outline at `root` that reading `location` as a model or an adapter takes."""
    weights, others = choose(location, role)
    folder = location if location.is_dir() else location.parent

    def named(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((folder / name).relative_to(root).as_posix() for name in names))

    if role == "any" and (folder / PROVENANCE).is_file():
        others = [*others, PROVENANCE]  # it tells what was written
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{printable(location)}: weight files are missing:", map(printable, missing))
    return Needed(named(weights), named(others))


def choose(location: Path, role: Role) -> tuple[list[str], list[str]]:
    """Weights and other files, as paths in the folder."""
    if not location.is_dir():
        folder, name = location.parent, location.name
        if name.endswith(INDEX_SUFFIX):
            shards = list(dict.fromkeys(read_index(location)[0].values()))
            return shards, [name, *sort_side_files(folder, {*shards, name})[0]]
        beside = sort_side_files(folder, {name})[0] if role == "adapter" else []
        if name.endswith(".gguf"):
            return names_of_parts(name), beside
        return [name], [*(n for n in CONFIGS if (folder / n).is_file()), *beside]
    if is_pipeline(location):
        return files_of_pipeline(location, has_adapter)
    names = sorted(path.name for path in location.iterdir() if not path.is_dir())
    if role != "adapter" and (alone := gguf_alone(location)) is not None:
        return names_of_parts(alone.name), []
    adapter = any(form.recognises(location) for form in FORMATS)
    if adapter and (role == "adapter" or (role == "any" and "config.json" not in names)):
        return format_at(location).needed(location)
    if role == "adapter":
        plain, of_llama = ([name for name in names if name.endswith(end)] for end in (".safetensors", ".gguf"))
        found = plain or of_llama
        if len(found) > 1:
            listed = ", ".join(map(printable, found))
            shown = printable(location)
            raise InputError(f"{shown}: contains several files ({listed}); name one{way_inside(shown, found[0])}")
        return found, sort_side_files(location, set(found))[0]
    index = choose_index(location, names, [])
    shards = (
        list(dict.fromkeys(read_index(index)[0].values())) if index else choose_shards(location, names, [], has_adapter)
    )
    own = {index.name} if index else set()
    return shards, [*own, *sort_side_files(location, {*shards, *own})[0]]


def put_headers(remote: Remote, root: Path, names: Iterable[str]) -> None:
    """Give files of the outline their headers, and their size as a hole."""

    def put(name: str) -> None:
        path, size = root / name, remote.files[name].size
        path.write_bytes(distant_header(path, size, partial(read_range, remote, name), FIRST_READ))
        os.truncate(path, size)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(put, names))


def put_records(remote: Remote, root: Path, names: Iterable[str]) -> None:
    """Give the outline the records of what was made by loratool that are among these files."""
    for path in map(PurePath, names):
        if path.name == PROVENANCE:
            (root / path).write_bytes(read_small(remote, path))


@contextmanager
def standing_for(remote: Remote, root: Path, names: Iterable[str]) -> Iterator[None]:
    """Let files of the outline stand for those of the repository: whoever reads their tensors is given theirs."""
    files = ((name, remote.files[name]) for name in names)
    every = {
        os.fspath(root / name): RangedFile(there.size, there.sha256 or there.blob, partial(read_range, remote, name))
        for name, there in files
    }
    standing.update(every)
    try:
        yield
    finally:
        for path in every:
            standing.pop(path, None)


def read_small(remote: Remote, path: PurePath) -> bytes:
    """A JSON file of a repository, whole; raises `InputError` for one that is too large to be what it is called."""
    name = path.as_posix()
    check_bound(f"{remote.repo}: {printable(name)}", remote.files[name].size, largest_of(path.name))
    return read_range(remote, name)


def read_range(remote: Remote, name: str, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes of a file from `start` on, by a range request; nothing more is taken off the line."""
    size = remote.files[name].size
    count = size - start if count is None else count
    if count <= 0:
        return b""
    url = hub.hf_hub_url(remote.repo, name, revision=remote.commit)
    headers = {**hub_utils.build_hf_headers(library_name="loratool"), "Range": f"bytes={start}-{start + count - 1}"}
    headers["Accept-Encoding"] = "identity"

    def read() -> bytes:
        with hub_utils.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            hub_utils.hf_raise_for_status(response)
            check_range(f"{remote.repo}: {name}", response, start, count, size)
            return take(response, start, count)

    with asking(remote.repo, most=size):
        found = patiently(read)
    if len(found) != count:
        raise HubError(
            f"{remote.repo}: {printable(name)}: the server sent {len(found)} of {count} bytes; try again later"
        )
    return found


def take(response: Any, start: int, count: int) -> bytes:
    """The bytes that were asked for, also from a server that knows no ranges and sends the whole file."""
    skip = 0 if response.status_code == 206 else start
    found = bytearray()
    for piece in response.iter_bytes():
        found += piece
        if len(found) >= skip + count:
            break
    return bytes(found[skip : skip + count])
