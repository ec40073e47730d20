"""What one worker brings of an output file in a store, and the numbered parts of the upload that this becomes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from loratool.files.part_records import FilePart
from loratool.stores.objects import StoredObject


@dataclass(frozen=True)
class Fringe:
    """Bytes of an upload that belong to no chunk of its own: of the header, padding, or of an object in a store."""

    at: int  # byte of the file
    size: int
    source: StoredObject | None = None
    start: int = 0  # byte of the source


@dataclass(frozen=True)
class Piece:
    """One numbered part of an upload."""

    number: int
    start: int  # byte of the file
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class UploadPart(FilePart):
    """Some neighbouring pieces of one output file, all copied inside the store or all sent there."""

    first: int = 1  # number of its first piece
    cuts: tuple[int, ...] = ()  # bytes of the file at which pieces begin, and the last one ends
    fringes: tuple[Fringe, ...] = ()
    source: StoredObject | None = None  # what it is copied from
    source_start: int = 0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(Piece(self.first + n, *cut) for n, cut in enumerate(pairwise(self.cuts)))
