"""What the texts of results are made of: sizes with units, rows in columns, counted values.

Packages for tables do not escape what stands in files, nor shorten a name at its beginning; `tqdm.format_sizeof` gives
three digits and no unit of memory by itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from loratool.errors import escaped, printable
from loratool.results.base import Cost
from loratool.shown import size

Layer = TypeVar("Layer")
COLUMNS = 80
MOST_LAYERS = 8  # rows of a table of layers before the rest is counted
MOST_LINES = 40  # rows of a listing before the rest is counted


def memory(count: int) -> str:
    """Bytes that a process took; 0 where the system does not report them."""
    return size(count) if count else "not reported by this system"


def cost_rows(cost: Cost) -> list[tuple[str, object]]:
    """What a command took."""
    return [
        ("took", f"{cost.seconds:.2f} s on {cost.device}, start-up {cost.startup_seconds:.2f} s"),
        ("peak memory", memory(cost.peak_memory)),
    ]


def aligned(rows: Sequence[tuple[str, object]]) -> str:
    """`name  value` lines with the values in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {escaped(str(value))}" for name, value in rows)


def spread(values: Mapping[str, int]) -> str:
    """Counted values: `16`, or `16 ×200, 32 ×24` where there are several."""
    return next(iter(values)) if len(values) == 1 else counted(values) or "none"


def counts(values: Iterable[object]) -> dict[str, int]:
    """Each value as text, the most frequent first, and how often it is there."""
    return dict(Counter(map(str, values)).most_common())


def plural(count: int, noun: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def percent(part: float) -> str:
    """A relative error."""
    return f"{100 * part:.3g} %" if part >= 1e-5 or part == 0 else f"{part:.1e}"


def kept(part: float | None) -> str:
    """A part of the energy; what is not all of it is not shown as 100.0 %, unless the rest is only rounding."""
    if part is None:
        return "–"
    digits = 2 if 0.9995 <= part < 0.99995 else 1
    return f"{100 * part:.{digits}f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def widest(values: list[float | None]) -> float | None:
    """The value farthest from 0."""
    return max((value for value in values if value is not None), key=abs, default=None)


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ×{count}" for value, count in values.items())


def shortened(names: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The first names, and how many more there are."""
    return [*names[:most], *([f"… and {len(names) - most} more"] if len(names) > most else [])]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], more: int, room: int = 1 << 30) -> list[str]:
    """Lines of cells in columns to the right, the last column, a name, to the left in `room` characters."""
    every = [header, *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in every) for at in range(len(header) - 1)]
    room -= sum(widths) + 2 * len(widths)
    lines = [
        "  ".join([*(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)), fitted(row[-1], room)])
        for row in every
    ]
    return [*lines, *([f"… and {more} more"] if more > 0 else [])]


def worst_first(
    header: Sequence[str],
    layers: Mapping[str, Layer],
    loss: Callable[[Layer], float],
    cells: Callable[[Layer], Sequence[str]],
) -> list[str]:
    """A table of layers, those that lose most first; the last column is their targets."""
    worst = sorted(layers.items(), key=lambda item: -loss(item[1]))
    rows = [[*cells(layer), printable(target.removesuffix(".weight"))] for target, layer in worst[:MOST_LAYERS]]
    return table(header, rows, len(worst) - len(rows))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0) -> str:
    """The same as text of 80 columns."""
    return "\n".join(table(header, rows, more, COLUMNS))


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def fitted(name: str, room: int) -> str:
    """A name in some columns: of one that is longer the end, which tells most."""
    return name if len(name) <= max(room, 12) else f"…{name[-(max(room, 12) - 1) :]}"


def figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def percentage(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"
