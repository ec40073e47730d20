"""Weight files that are still on the Hub: what the files of an outline stand for (`stand_ins`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from loratool.files.safefile import Identity, Layout
from loratool.files.small_tensors import ReadRange, SmallTensors
from loratool.files.source import Source

AHEAD = 1 << 20  # bytes that are asked for together, where a file is read from its beginning


@dataclass(frozen=True)
class RangedSource:
    """The bytes of a file on the Hub: those of small tensors are kept, all others asked for each time."""

    size: int
    ask: ReadRange
    small: SmallTensors | None

    def read(self, start: int, count: int, into: memoryview) -> None:
        if self.small is None or not self.small.read(start, count, into):
            into[:count] = self.ask(start, count)


@dataclass(frozen=True)
class RangedFile:
    """A file of one commit."""

    size: int
    state: str  # its digest
    ask: ReadRange
    small: dict[str, SmallTensors] = field(default_factory=dict, repr=False, compare=False)  # kept as they arrive

    @property
    def identity(self) -> Identity:
        return Identity(0, int.from_bytes(hashlib.sha256(self.state.encode()).digest()[:7], "little"), self.size, 0)

    @property
    def ahead(self) -> int:
        return min(AHEAD, self.size)

    def source(self, layout: Layout | None = None) -> Source:
        if layout is not None and "" not in self.small:
            self.small[""] = SmallTensors(layout, self.ask)
        return RangedSource(self.size, self.ask, self.small.get(""))
