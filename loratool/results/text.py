"""What the texts of results are made of: sizes with units, rows in columns, counted values.

Packages for tables do not escape what stands in files, nor shorten a name at its beginning; `tqdm.format_sizeof` gives
three digits and no unit of memory by itself.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from loratool.errors import escaped, printable
from loratool.results.base import Cost
from loratool.shown import size

Layer = TypeVar("Layer")
COLUMNS = 80
ENDLESS = 1 << 30  # columns of a file, a pipe or a notebook
NARROWEST = 40  # columns; what does not fit into these runs over
NAMED = 20  # letters of a name that say which one it is: of a longer one, in a table that is too wide, the last so many
SHORTEST = 12  # letters of a name that are shown wherever it is
MOST_LAYERS = 8  # rows of a table of layers before the rest is counted
MOST_LINES = 40  # rows of a listing before the rest is counted
TERMINAL = ContextVar("TERMINAL", default=ENDLESS)  # columns of what a text is made for


@contextmanager
def fitting(columns: int) -> Iterator[None]:
    """Texts that are made within this fit into a terminal; all others are the same wherever they are shown."""
    before = TERMINAL.set(max(columns, NARROWEST))
    try:
        yield
    finally:
        TERMINAL.reset(before)


def room_for(most: int) -> int:
    """Columns that a line may take: `most`, or what the terminal has if that is less."""
    return min(most, TERMINAL.get())


def memory(count: int) -> str:
    """Bytes that a process took; 0 where the system does not report them."""
    return size(count) if count else "not reported by this system"


def cost_rows(cost: Cost) -> list[tuple[str, object]]:
    """What a command took."""
    return [
        ("took", f"{cost.seconds:.2f} s on {cost.device}, start-up {cost.startup_seconds:.2f} s"),
        ("peak memory", memory(cost.peak_memory)),
    ]


def aligned(rows: Iterable[tuple[str, object]], room: int = ENDLESS) -> str:
    """`name  value` lines, values in one column and broken between words where they are longer than `room`."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0) + 2
    return "\n".join(fill(str(value), f"{name:<{width}}", " " * width, room) for name, value in pairs)


def fill(text: str, first: str = "", later: str = "", room: int = COLUMNS) -> str:
    """Text in lines of `room` columns; a word that is longer, such as a path, stays whole."""
    text, room = escaped(text), room_for(room)
    if len(first) + len(text) <= room:
        return (first + text).rstrip()
    return textwrap.fill(
        text, room, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def row_if(condition: object, name: str, value: object) -> list[tuple[str, object]]:
    """One `name  value` line, and none where `condition` does not hold."""
    return [(name, value)] if condition else []


def spread(values: Mapping[str, int]) -> str:
    """Counted values: `16`, or `16 ×200, 32 ×24` where there are several."""
    return next(iter(values)) if len(values) == 1 else counted(values) or "none"


def counts(values: Iterable[object]) -> dict[str, int]:
    """Each value as text, the most frequent first, and how often it is there."""
    return dict(Counter(map(str, values)).most_common())


def plural(count: int, noun: str) -> str:
    """1 tensor, 2 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def one_of(names: Sequence[str]) -> str:
    """`SDXL`, or `SDXL, Stable Diffusion 1 or Stable Diffusion 2`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


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


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ×{count}" for value, count in values.items())


def shortened(names: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The first names, and how many more there are."""
    return [*names[:most], *([f"… and {len(names) - most} more"] if len(names) > most else [])]


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    more: int = 0,
    room: int = ENDLESS,
    spare: Sequence[str] = (),
) -> str:
    """Cells in columns to the right, the last column, a name, to the left in `room` characters.

    In a terminal that is too narrow, names lose their beginnings, down to `NAMED` letters; then columns are left out, first
    those that `spare` names, then the last ones. A line below the table says which.
    """
    every = [header, *([escaped(cell) for cell in row] for row in rows)]
    *widths, longest = (max(map(len, column)) for column in zip(*every, strict=True))
    shown = [*range(len(widths))]
    for at in (*(header.index(name) for name in spare if name in header), *range(len(widths) - 1, 0, -1)):
        if at in shown and sum(widths[one] + 2 for one in shown) + min(longest, NAMED) > room_for(ENDLESS):
            shown.remove(at)
    room = room_for(room) - sum(widths[at] + 2 for at in shown)
    heading = textwrap.shorten(header[-1], max(room, SHORTEST), placeholder="…")
    ends = [heading, *(fitted(row[-1], room) for row in every[1:])]
    lines = [
        "  ".join([*(f"{row[at]:>{widths[at]}}" for at in shown), end]) for row, end in zip(every, ends, strict=True)
    ]
    lines += [f"… and {more} more"] if more > 0 else []
    left_out = [header[at] for at in range(len(widths)) if at not in shown]
    lines += [fill(f"not shown in {room_for(ENDLESS)} columns: {', '.join(left_out)}")] if left_out else []
    return "\n".join(lines)


def worst_first(
    header: Sequence[str],
    layers: Mapping[str, Layer],
    loss: Callable[[Layer], float],
    cells: Callable[[Layer], Sequence[str]],
) -> str:
    """A table of layers, those that lose most first; the last column is their targets."""
    worst = sorted(layers.items(), key=lambda item: -loss(item[1]))
    rows = [[*cells(layer), printable(target.removesuffix(".weight"))] for target, layer in worst[:MOST_LAYERS]]
    return table(header, rows, len(worst) - len(rows))


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left and the others to the right.

    In a terminal that is too narrow, columns that it has no room for come below the others, behind the first once more.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[]]  # numbers of columns besides the first
    for at in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(widths[one] + 2 for one in (*blocks[-1], at)) > room_for(ENDLESS):
            blocks.append([])
        blocks[-1].append(at)
    return "\n\n".join(
        "\n".join("  ".join([row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in block)]) for row in rows)
        for block in blocks
    )


def fitted(name: str, room: int) -> str:
    """A name in some columns: of one that is longer the end, which tells most."""
    room = max(room, SHORTEST)
    return name if len(name) <= room else f"…{name[1 - room :]}"


def figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
