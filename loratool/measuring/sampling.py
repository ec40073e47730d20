"""Which rows of a weight are looked at, where some of them say enough of all."""

from __future__ import annotations

from collections.abc import Iterator

PARTS = 16  # runs of rows that a sample is read in


def sample(rows: int, wanted: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of evenly spread runs that are `wanted` rows together, or of all rows."""
    if rows <= wanted:
        yield 0, rows
        return
    parts = min(PARTS, wanted)
    each = wanted // parts
    for part in range(parts):
        yield part * rows // parts, each
