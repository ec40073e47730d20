"""`Source`: bytes that can be read from any place on. What reads a weight knows no more than this of where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 1 << 19  # bytes that are read at a time, and looked at while a core has them in its cache


class Source(Protocol):
    """Bytes from 0 to `size`. Any thread may read, at the same time as others."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, start: int, count: int, into: memoryview) -> None:
        """Fill the first `count` bytes of `into` from byte `start` on. Raises `InputError` where the bytes end early."""


def read_pieces(source: Source, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` … `stop` of a source, piece by piece in the same memory."""
    buffer = memoryview(bytearray(min(PIECE, stop - start)))
    for at in range(start, stop, PIECE):
        piece = buffer[: stop - at]
        source.read(at, len(piece), piece)
        yield piece


def expect(source: Source, start: int, count: int) -> None:
    """Say that this thread is about to read `count` bytes from byte `start` on, in their order, in pieces.

    A source that is far away asks for many of them at a time, and for none that were not expected; a disk is asked for them
    now.
    """
    if (told := getattr(source, "expect", None)) is not None:
        told(start, count)
