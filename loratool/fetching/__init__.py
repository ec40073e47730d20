"""Operands that name a place on the Hub or in a store become local folders, here and nowhere else.

    local("org/name@main", "model")  → …/models--org--name/snapshots/COMMIT, with the files that are needed

What exists locally wins, and then nothing that asks the Hub or a store is even imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.arguments import PathLike
from loratool.errors import UsageError, about, printable
from loratool.files.folders import holds_weights
from loratool.files.hub_names import PAGE, HubPath, parse, slashed
from loratool.files.names import at_home
from loratool.files.untrusted import reading
from loratool.stores.names import StorePath, parse_store

if TYPE_CHECKING:
    from loratool.fetching.outline import Role

__all__ = ["HubPath", "check_there", "headers", "local", "parse", "place_of"]


def place_of(operand: PathLike) -> HubPath | StorePath | None:
    """The place on the Hub or in a store that an operand names; None for one that is here, or can only be a path."""
    if os.path.lexists(operand):
        return None
    if (stored := parse_store(operand)) is not None:
        return stored
    if page := re.match(PAGE, slashed(operand)):
        address = printable(operand).replace(":/", "://", 1).replace(":///", "://")  # a Path keeps one slash
        raise UsageError(f"{address} is the address of a web page; use the repository id {page['repo']}")
    return parse(operand)


def check_there(*operands: PathLike) -> None:
    """Raise `InputError` for the first of some operands that can only be a path and is not there.

    A command whose operands are not read in their order calls it before it downloads or reads any.
    """
    for operand in operands:
        if place_of(operand) is None:
            path = at_home(operand)
            with about(operand), reading(path):
                path.stat()


def local(operand: PathLike, role: Role | None = "any") -> Path:
    """The folder or file that an operand means: itself, a download of it that the Hub's cache keeps, or what stands for
    a place in a store.

    Args:
        operand: a path, or a place on the Hub or in a store. A revision is resolved to a commit, which the result's path
            names.
        role: what it will be read as; of a repository that holds more than that the rest is not downloaded. None for
            headers alone, which only a store has without the rest.

    Raises:
        UsageError: an address that can be neither.
        InputError: there is no such path, or the repository holds no such thing.
        StorageError: the cache has no room for it.
        HubError: missing, gated, private or out of reach; offline and not in the cache.
        StoreError: the same of a store.
    """
    with about(operand):
        place = place_of(operand)
        if place is None:
            check_there(operand)
            return at_home(operand)
        if isinstance(place, StorePath):
            from loratool.fetching.stores import brought

            return brought(place, role)
        from loratool.fetching.downloading import cached, download, is_offline

        return cached(place) if is_offline() else download(place, role or "any")


@contextmanager
def headers(operand: PathLike) -> Iterator[Path]:
    """A local operand itself; of a place on the Hub or in a store an outline with headers and configs.

    Small tensors are read by range requests, and no file of weights is downloaded.

    Raises as `local` does.
    """
    with about(operand):
        place = place_of(operand)
        if isinstance(place, HubPath):
            from loratool.fetching.downloading import is_offline, root_of
            from loratool.fetching.outline import (
                Needed,
                look_up,
                needed,
                outlined,
                put_headers,
                put_records,
                standing_for,
            )

            if not is_offline():
                remote = look_up(place)
                with outlined(remote, place) as location:
                    root = root_of(location, place)
                    names = needed(root, location, "any") if holds_weights(location) else Needed((), ())
                    put_headers(remote, root, names.weights)
                    put_records(remote, root, names.others)
                    with standing_for(remote, root, names.weights):
                        yield location
                return
        yield local(operand, None)
