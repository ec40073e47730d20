"""Weight files of this disk that stand for objects elsewhere: they have the header and the size, the rest is a hole.

The rules for local folders run on them. Whoever reads tensors is given the bytes of the object instead of the hole:
`SafeFile.open` and `parts_of` ask here first. Nothing else reads beyond a header.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tempfile
    from pathlib import Path

    from loratool.files.source import Source

    # `safefile`, which has both, asks this module
    Identity = Any
    Layout = Any


class StandIn(Protocol):
    """What a file stands for."""

    @property
    def identity(self) -> Identity:
        """What tells whether the object is still the one that was listed."""

    @property
    def ahead(self) -> int:
        """Bytes that a thread may hold of it while it reads what it expects."""

    @property
    def state(self) -> str:
        """What tells its content, whoever asks from wherever; another content has another state."""

    def source(self, layout: Layout | None = None) -> Source:
        """The bytes of the object, all of that one content. `layout` is its header, where it is known."""


standing: dict[str, StandIn] = {}  # path → what it stands for
copied: dict[str, Identity] = {}  # path of a copy of a whole object → what tells whether that is still the same
hashed: dict[str, str] = {}  # path → the SHA-256 of what it stands for, once somebody has read all of it
homes: list[tempfile.TemporaryDirectory[str]] = []  # the folders that they lie in


def forget() -> None:
    """Remove all of them, at the end of a process that has no use for them any more."""
    standing.clear()
    copied.clear()
    hashed.clear()
    for home in homes:
        home.cleanup()
    homes.clear()


def stand_in(path: Path) -> StandIn | None:
    """What a file stands for; None for a file that is its own."""
    return standing.get(os.fspath(path)) if standing else None


class Bytes(io.RawIOBase):
    """A source as Python's files are read."""

    def __init__(self, source: Source) -> None:
        self.source, self.at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.source.size}[whence]
        return self.at

    def readinto(self, into: Any) -> int:
        count = max(0, min(len(into), self.source.size - self.at))
        self.source.read(self.at, count, memoryview(into))
        self.at += count
        return count


def stream_of(there: StandIn) -> io.BufferedReader:
    """The bytes of what a file stands for, as those of an open file."""
    return io.BufferedReader(Bytes(there.source()), max(1, there.ahead))


def told_identity(path: Path) -> Identity | None:
    """What identifies the object that a file stands for, or is a copy of; None for any other file."""
    if (found := stand_in(path)) is not None:
        return found.identity
    return copied.get(os.fspath(path)) if copied else None
