"""Repositories of the Hub brought into the folders of its cache."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from loratool.errors import HubError, StorageError, printable
from loratool.fetching.answers import commit_of
from loratool.fetching.client import api, asking, is_offline, patiently
from loratool.fetching.outline import Remote, Role, look_up, needed, outlined
from loratool.files.digests import sha256_of
from loratool.files.hub_names import HubPath
from loratool.files.system import free_space
from loratool.lazy import hub, hub_constants, hub_errors
from loratool.shown import size

__all__ = ["cached", "download", "is_offline", "root_of"]

DOWNLOADERS = 8  # files that are downloaded at the same time


def root_of(location: Path, place: HubPath) -> Path:
    """The folder of the whole repository."""
    return location.parents[place.inside.count("/")] if place.inside else location


def download(place: HubPath, role: Role) -> Path:
    """Bring what is needed of a repository into the Hub's cache."""
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
            f"{remote.repo}: needs {size(wanted)} in the cache {printable(cache)}, but only {size(free)} is free; "
            "`loratool merge --stream` needs space for two files only"
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
