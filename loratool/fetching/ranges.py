"""Weight files that are still on the Hub: their small tensors are read by range requests, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loratool.files.gguf import GgufFile
from loratool.files.safefile import SafeFile
from loratool.files.small_tensors import SmallTensors
from loratool.files.source import Source


@dataclass(frozen=True)
class RangedSource:
    """The bytes of a file on the Hub: those of small tensors are kept, all others asked for each time."""

    size: int
    small: SmallTensors

    def read(self, start: int, count: int, into: memoryview) -> None:
        if not self.small.read(start, count, into):
            into[:count] = self.small.ask(start, count)


@dataclass(frozen=True)
class Ranged(SafeFile):
    """A weight file of which only the header is here."""

    small: SmallTensors

    @contextmanager
    def open(self) -> Iterator[Source]:
        yield RangedSource(self.layout.size, self.small)

    def check_unchanged(self, source: Source | None = None) -> None:
        """Nothing: it is a file of one commit."""


@dataclass(frozen=True)
class RangedGguf(Ranged, GgufFile):
    """The same of a GGUF file."""
