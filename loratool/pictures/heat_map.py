"""A heat map: numbers or states by row and column, such as module kinds and layers, or every two of some adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratool.pictures.colours import LEVELS
from loratool.pictures.drawing import Drawing, Figure, legend, mark, safe, widest, width_of
from loratool.results.text import figure, fitted

WIDTH, HALF = 1080, 520  # pixels of a map with enough columns, and of one that has another next to it
LONGEST = 40  # letters of a label
TALL = 40  # rows, from which they are lower
ROOM = 34  # pixels of a cell in which a number can be read
STEP = 8  # pixels of a level in the legend


@dataclass(frozen=True)
class Cell:
    """A place of a map and what is there."""

    row: int
    column: int
    value: float | None  # of states: which of them; None where there is no number
    label: str = ""  # what it is the value of
    entry: int | None = None  # the row of the page's linked table that has the same


@dataclass(frozen=True, kw_only=True)
class HeatMap(Figure):
    """Cells whose colour tells their value."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    scale: Literal["up", "down", "both"] = "up"  # whether the largest value stands out, or the smallest, or both
    bounds: tuple[float | None, float | None] = (None, None)  # of the colours; None: that of the values
    states: tuple[
        tuple[str, str], ...
    ] = ()  # name and class of each, for values that are states: s0 … s7, bad or quiet
    numbers: bool = False  # whether a cell with room shows its value
    what: str = ""  # what the value is, before it in a tooltip

    def draw(self, alone: bool) -> Drawing:
        low, high = self.range()
        grid = self.grid
        parts = [*row_labels(self.rows, grid), *column_labels(self.columns, grid), '<g class="cells">']
        parts += [self.cell(cell, grid, low, high, alone) for cell in self.cells]
        parts.append("</g>")
        if self.numbers:
            parts += [self.number(cell, grid, low, high) for cell in self.cells if cell.value is not None]
        bottom = grid.top + grid.tall * len(self.rows) + 14
        parts.append(legend(self.states, bottom) if self.states else self.legend(bottom, low, high))
        right = max(grid.right, LEVELS * STEP + 140)
        return Drawing(right, bottom + 16, "\n".join(parts), (("what", self.what),))

    @property
    def wide(self) -> bool:
        """Whether it has more columns than half a page has room for."""
        return self.grid.right > HALF

    @property
    def grid(self) -> Grid:
        """Where the cells are. Columns with names that are longer than a cell is wide have them leaning."""
        left, name = widest(self.rows, LONGEST) + 14, widest(self.columns, LONGEST)
        lean = name > 40 and not all(column.isdigit() for column in self.columns)
        room = name * 0.72 + 4 if lean else 8.0
        wide = min(46.0, max(7.0, (WIDTH - left - room) / max(1, len(self.columns))))
        tall = 24.0 if len(self.rows) <= TALL else max(6.0, 24 * TALL / len(self.rows))
        if self.numbers:
            wide, tall = max(wide, ROOM + 4.0), max(tall, 26.0)
        return Grid(left, room + 10 if lean else 18.0, wide, tall, left + wide * len(self.columns) + room, lean)

    def range(self) -> tuple[float, float]:
        """The values of the first colour and the last."""
        values = [cell.value for cell in self.cells if cell.value is not None]
        low, high = self.bounds
        low = min(values, default=0.0) if low is None else low
        high = max(values, default=0.0) if high is None else high
        if figure(low, 4) == figure(high, 4):  # colours tell no differences that the numbers do not
            high = low
        bound = max(abs(low), abs(high))
        return (-bound, bound) if self.scale == "both" else (low, high)

    def level(self, value: float, low: float, high: float) -> int:
        """Which of the colours a value has."""
        part = (value - low) / (high - low) if high > low else 0.5 if value else 0.0
        level = round(min(1.0, max(0.0, part)) * (LEVELS - 1))
        return LEVELS - 1 - level if self.scale == "down" else level

    def cell(self, cell: Cell, grid: Grid, low: float, high: float, alone: bool) -> str:
        if cell.value is None:
            kind, told = "none", "–"
        elif self.states:
            told, kind = self.states[int(cell.value)]
        else:
            kind, told = (
                f"{'d' if self.scale == 'both' else 'q'}{self.level(cell.value, low, high)}",
                figure(cell.value, 4),
            )
        hint = safe(f"{cell.label}: {self.what} {told}".replace(":  ", ": ")) if cell.label else safe(told)
        title = None if cell.entry is not None and not alone else mark("title", hint)
        return mark(
            "path", title, kind=kind, data_e=None if alone else cell.entry, d=grid.square(cell.row, cell.column)
        )

    def number(self, cell: Cell, grid: Grid, low: float, high: float) -> str:
        value = cell.value or 0.0
        level = self.level(value, low, high)
        strong = level > LEVELS * 0.45 if self.scale != "both" else abs(level - LEVELS / 2) > LEVELS * 0.3
        x, y = grid.middle(cell.row, cell.column)
        return mark(
            "text",
            f"{round(value, 2) + 0.0:.2f}",  # no −0.00
            kind="i" if strong else "o",
            x=x,
            y=y + 4,
            text_anchor="middle",
            pointer_events="none",
        )

    def legend(self, top: float, low: float, high: float) -> str:
        """The scale, with the values at its ends."""
        start, letter = width_of(figure(low, 4)) + 8, "d" if self.scale == "both" else "q"
        levels = range(LEVELS - 1, -1, -1) if self.scale == "down" else range(LEVELS)
        steps = "".join(
            mark("rect", kind=f"{letter}{level}", x=start + at * STEP, y=top, width=STEP + 0.3, height=9)
            for at, level in enumerate(levels)
        )
        ends = mark("text", figure(low, 4), kind="low", x=start - 8, y=top + 9, text_anchor="end")
        ends += mark("text", figure(high, 4), kind="high", x=start + LEVELS * STEP + 8, y=top + 9)
        return ends + steps


@dataclass(frozen=True)
class Grid:
    """Where the cells of a map are, in pixels."""

    left: float
    top: float
    wide: float
    tall: float
    right: float  # of everything
    lean: bool  # whether names of columns do

    def square(self, row: int, column: int) -> str:
        """The outline of a cell; a path is shorter than a rectangle of four attributes."""
        gap = 2 if self.wide > 12 and self.tall > 12 else 1
        x, y = self.left + column * self.wide, self.top + row * self.tall
        wide, tall = self.wide - gap, self.tall - gap
        return f"M{x:.1f} {y:.1f}h{wide:.1f}v{tall:.1f}h-{wide:.1f}z".replace(".0", "")

    def middle(self, row: int, column: int) -> tuple[float, float]:
        return self.left + (column + 0.5) * self.wide - 1, self.top + (row + 0.5) * self.tall - 1


def row_labels(names: tuple[str, ...], grid: Grid) -> list[str]:
    """As many as there is room for."""
    every = max(1, -int(-13 // grid.tall))
    return [
        mark(
            "text",
            safe(fitted(name, LONGEST)),
            kind="n",
            x=grid.left - 10,
            y=grid.top + (at + 0.5) * grid.tall + 3,
            text_anchor="end",
        )
        for at, name in enumerate(names)
        if at % every == 0
    ]


def column_labels(names: tuple[str, ...], grid: Grid) -> list[str]:
    """Numbers upright and names leaning, as many as there is room for."""
    every = max(1, -int(-(14 if grid.lean else widest(names, LONGEST) + 6) // grid.wide))
    shown = [(grid.left + (at + 0.5) * grid.wide, name) for at, name in enumerate(names) if at % every == 0]
    y = grid.top - 7
    if not grid.lean:
        return [mark("text", safe(name), x=x, y=y, text_anchor="middle") for x, name in shown]
    return [
        mark("text", safe(fitted(name, LONGEST)), kind="n", transform=f"translate({x:.1f} {y:.1f}) rotate(-45)")
        for x, name in shown
    ]
