"""Operands that name a place on the Hub or in a store become local folders, here and nowhere else.

    local("org/name@main", "model")  → …/models--org--name/snapshots/COMMIT, with the files that are needed

What exists locally wins, and then the Hub's client is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from loratool.data import dataclass
from loratool.errors import HubError, StorageError, UsageError, about, printable
from loratool.fetching.answers import commit_of
from loratool.fetching.client import api, asking, is_offline, patiently
from loratool.fetching.outline import Remote, Role, look_up, needed, outlined, put_headers, ranged_member
from loratool.fetching.stores import brought
from loratool.files.checkpoint import Checkpoint, holds_weights
from loratool.files.digests import sha256_of
from loratool.files.hub_names import PAGE, HubPath, parse, slashed
from loratool.files.names import at_home
from loratool.files.system import free_space
from loratool.lazy import hub, hub_constants, hub_errors
from loratool.stores.names import StorePath, parse_store

__all__ = ["HubPath", "Located", "Role", "headers", "local", "parse", "place_of"]

DOWNLOADERS = 8  # files that are downloaded at the same time


def place_of(operand: str | os.PathLike[str]) -> HubPath | StorePath | None:
    """The place on the Hub or in a store that an operand names; None for one that is here, or can only be a path."""
    if os.path.lexists(operand):
        return None
    if (stored := parse_store(operand)) is not None:
        return stored
    if page := PAGE.match(slashed(operand)):
        address = printable(operand).replace(":/", "://", 1).replace(":///", "://")  # a Path keeps one slash
        raise UsageError(f"{address} is the address of a web page; use the repository id {page['repo']}")
    return parse(operand)


def local(operand: str | os.PathLike[str], role: Role = "any") -> Path:
    """The folder or file that an operand means: itself, a download of it that the Hub's cache keeps, or what stands for
    a place in a store.

    Args:
        operand: a path, or a place on the Hub or in a store. A revision is resolved to a commit, which the result's path
            names.
        role: what it will be read as; of a repository that holds more than that the rest is not downloaded.

    Raises:
        UsageError: an address that can be neither.
        InputError: the repository holds no such thing.
        StorageError: the cache has no room for it.
        HubError: missing, gated, private or out of reach; offline and not in the cache.
        StoreError: the same of a store.
    """
    with about(operand):
        place = place_of(operand)
        if place is None:
            return at_home(operand)
        if isinstance(place, StorePath):
            return brought(place, role)
        return cached(place) if is_offline() else download(place, role)


@dataclass(frozen=True)
class Located:
    """Where an operand is: on this disk, or in an outline of a repository."""

    path: Path
    remote: Remote | None = None  # what the outline is of
    root: Path = Path()  # of the outline

    def checkpoint(self, unmerged: bool = False) -> Checkpoint:
        """The model that is there, as `open_checkpoint` opens it."""
        from loratool.bases.opening import open_checkpoint

        found = open_checkpoint(self.path, unmerged)
        if self.remote is None:
            return found
        return replace(found, shards=tuple(ranged_member(self.remote, self.root, shard) for shard in found.shards))


@contextmanager
def headers(operand: str | os.PathLike[str]) -> Iterator[Located]:
    """A local operand itself; of a place on the Hub or in a store an outline with headers and configs.

    Small tensors are read by range requests, and no file of weights is downloaded.

    Raises as `local` does.
    """
    with about(operand):
        place = place_of(operand)
        if place is None:
            yield Located(at_home(operand))
        elif isinstance(place, StorePath):
            yield Located(brought(place, None))
        elif is_offline():
            yield Located(cached(place))
        else:
            remote = look_up(place)
            with outlined(remote, place) as location:
                root = root_of(location, place)
                if holds_weights(location):
                    put_headers(remote, root, needed(root, location, "any").weights)
                yield Located(location, remote, root)


def root_of(location: Path, place: HubPath) -> Path:
    """The folder of the whole repository."""
    return location.parents[place.inside.count("/")] if place.inside else location


def download(place: HubPath, role: Role) -> Path:
    """Bring what is needed of a repository into the Hub's cache."""
    from concurrent.futures import ThreadPoolExecutor

    from loratool.adapters.formats import read_adapter

    remote = look_up(place)
    with outlined(remote, place) as location:
        found = needed(root_of(location, place), location, role)
        if role == "adapter" and not found.weights:
            read_adapter(location)  # which tells what is there in their place
        names = found.names
    before = in_cache(remote, names)
    new = [name for name in names if name not in before]
    check_room(remote, new)
    snapshot = snapshot_of(remote)
    api()  # which settles whether bars are shown
    largest = max((remote.files[name].size for name in new), default=0)
    with asking(place.repo, place.revision, most=largest), ThreadPoolExecutor(DOWNLOADERS) as downloaders:
        list(downloaders.map(partial(download_file, remote), new))
    check_content(remote, snapshot, new)
    remember(snapshot, place.revision or "main")
    return snapshot / place.inside


def snapshot_of(remote: Remote) -> Path:
    """The folder in which the Hub's cache keeps a commit."""
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=remote.repo, repo_type="model")
    return Path(os.path.realpath(hub_constants.HF_HUB_CACHE), folder, "snapshots", remote.commit)


def download_file(remote: Remote, name: str) -> None:
    """Bring one file of a commit into the cache.

    It is asked for by its commit, so that of all that a server says only the answer's headers become paths; they are
    checked as they arrive, and so is the place where the client has put the file.
    """
    get = partial(hub.hf_hub_download, remote.repo, name, revision=remote.commit, library_name="loratool")
    if not is_of(remote, name, patiently(get)):
        raise HubError(
            f"{remote.repo}: {printable(name)} came from another commit than {remote.commit}; try again later"
        )


def remember(snapshot: Path, revision: str) -> None:
    """Tell the cache which commit a revision is, as the client does: what it is asked for without a network."""
    path = snapshot.parent.parent / "refs" / revision
    if revision == snapshot.name or (path.is_file() and path.read_text() == snapshot.name):
        return
    with suppress(OSError):  # the cache may be one that is only read
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
        written.write_text(snapshot.name)
        os.replace(written, path)


def cached(place: HubPath) -> Path:
    """What the cache holds of a revision."""
    with asking(place.repo, place.revision):
        try:
            snapshot = hub.snapshot_download(
                place.repo,
                revision=place.revision,
                local_files_only=True,
                allow_patterns=["config.json", "adapter_config.json"],
            )
        except hub_errors.LocalEntryNotFoundError:
            raise HubError(
                f"{printable(place)}: no such folder or file, not in the Hub's cache, and HF_HUB_OFFLINE is set; "
                f"unset it, or run `hf download {place.repo}` while online",
            ) from None
    commit_of(place.repo, Path(snapshot).name)
    return Path(snapshot) / place.inside


def in_cache(remote: Remote, names: tuple[str, ...]) -> set[str]:
    """Those of the files that the cache has already."""
    found = {name: hub.try_to_load_from_cache(remote.repo, name, revision=remote.commit) for name in names}
    return {name for name, path in found.items() if isinstance(path, str) and is_of(remote, name, path)}


def is_of(remote: Remote, name: str, path: str) -> bool:
    """Whether a path of the cache is that of a file of this commit, and the file is there."""
    return Path(path).as_posix().endswith(f"/{remote.commit}/{name}") and os.path.exists(path)


def check_room(remote: Remote, names: list[str]) -> None:
    """Raise `StorageError` where the cache's disk has no room for these files."""
    cache = Path(hub_constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    wanted, free = sum(remote.files[name].size for name in names), free_space(there)
    if free is not None and wanted > free:
        raise StorageError(
            f"{remote.repo}: needs {wanted / 1e9:.2f} GB in the cache {printable(cache)}, but only {free / 1e9:.2f} "
            "GB are free; `loratool merge --stream` needs space for two files only"
        )


def check_content(remote: Remote, snapshot: Path, names: list[str]) -> None:
    """Hold what was downloaded to the Hub's own SHA-256: plain HTTP compares sizes only."""
    for name in names:
        wanted, path = remote.files[name].sha256, snapshot / name
        if wanted and sha256_of(path) != wanted:
            Path(os.path.realpath(path)).unlink()
            path.unlink(missing_ok=True)
            raise HubError(
                f"{remote.repo}: {printable(name)} was damaged in transfer and has been removed; run the same command "
                "to fetch it again"
            )
