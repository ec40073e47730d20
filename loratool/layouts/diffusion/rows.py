"""One row of a table of names, and how rows within a block are written down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A module, or a tensor, of the original layout and what diffusers makes of it.

    `#` stands for a number, `*` at the end of both for whatever follows. Several parts hold its rows one after the
    other.
    """

    original: str
    parts: tuple[str, ...]  # in diffusers
    # a letter for each part: `h` has as many rows as the weight has columns, the others have equal numbers of the rest
    sizes: str = ""
    swapped: bool = False  # the halves of (shift, scale) change places; of a weight with more such blocks they stay
    transposed: bool = False

    def called(self, original: str, parts: tuple[str, ...]) -> Row:
        """The same under other names; thousands are made, and `dataclasses.replace` takes three times as long."""
        return Row(original, parts, self.sizes, self.swapped, self.transposed)


def rows(*pairs: tuple[str, str] | tuple[str, str, str]) -> tuple[Row, ...]:
    """Rows from (original, parts with spaces between them), with the sizes of the parts where they differ."""
    return tuple(Row(original, tuple(parts.split()), "".join(sizes)) for original, parts, *sizes in pairs)


def within(original: str, diffusers: str, inner: Iterable[Row]) -> tuple[Row, ...]:
    """The same rows in a block."""
    return tuple(
        row.called(f"{original}.{row.original}", tuple(f"{diffusers}.{part}" for part in row.parts)) for row in inner
    )


@dataclass(frozen=True, eq=False)
class Family:
    """Models that share one table. They are known by their names: all of one of `marks`, in either layout."""

    name: str
    rows: tuple[Row, ...]
    marks: tuple[tuple[str, ...], ...]  # modules with # for numbers
