"""Lines over an axis, such as the spectra of all modules: a few with colours and names, or many with one in front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loratool.pictures.colours import SERIES
from loratool.pictures.drawing import Drawing, Figure, mark, safe
from loratool.results.text import figure, fitted

WIDTH, HEIGHT = 520, 262
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 10, 40  # pixels around the lines
FINE = 10  # units of a pixel in which points are given
LONGEST = 60  # letters of a name in the legend
DECADES = 6  # that a logarithmic axis spans at most


@dataclass(frozen=True)
class Line:
    """Points from left to right."""

    label: str
    points: tuple[tuple[float, float], ...]
    entry: int | None = None  # the row of the page's linked table that it belongs to


@dataclass(frozen=True)
class Axis:
    """What is along a side of a figure: from where to where, and what stands at it."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def part(self, value: float) -> float:
        """Where a value is: 0 at the low end, 1 at the high one."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value) if value > 0 else -math.inf
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """An axis for positive values, down to a millionth of the largest."""
    positive = [value for value in values if value > 0]
    high = math.log10(max(positive, default=1.0))
    low = min(max(high - DECADES, math.log10(min(positive, default=1.0))), high - 0.3)
    span = high - low
    step = 2.0 if span > 4 else 1.0 if span > 1.2 else 0.5 if span > 0.6 else 0.1
    first = math.floor(high / step)
    exponents = [at * step for at in range(first, first - 60, -1) if at * step >= low]
    return Axis(label, 10**low, 10**high, tuple((10**at, figure(10**at, 2)) for at in exponents), log=True)


def linear(label: str, low: float, high: float) -> Axis:
    """An axis with about five values of few digits at it."""
    span = high - low or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if span / (unit * times) <= 5)
    first = math.ceil(low / step - 1e-9)
    values = [at * step for at in range(first, first + 12) if at * step <= high + 1e-9 * span]
    return Axis(label, low, high, tuple((value, f"{round(value, 9):g}") for value in values))


def counting(label: str, high: int) -> Axis:
    """An axis of whole numbers from 1 on, such as ranks: the ends and the quarters."""
    marks = sorted({1, *(max(1, round(high * part)) for part in (0.25, 0.5, 0.75, 1))})
    return Axis(label, 1, max(high, 2), tuple((value, str(value)) for value in marks))


@dataclass(frozen=True, kw_only=True)
class Lines(Figure):
    """Lines on two axes. Those of a linked table are faint, and the chosen one is in front; others have colours."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[float, ...] = ()  # values of y with a broken line
    chosen: int | None = None  # the entry of the line in front, of those that are linked
    says: str = ""  # what a tooltip says of a point, with {x} and {y} in it

    @property
    def wide(self) -> bool:
        return False

    def draw(self, alone: bool) -> Drawing:
        parts = [*self.axes()]
        linked = any(line.entry is not None for line in self.lines)
        scaled = f'transform="scale({1 / FINE:g})"'
        lines = [self.path(line, at, linked, alone) for at, line in enumerate(self.lines)]
        front = [
            self.path(line, at, False, alone)
            for at, line in enumerate(self.lines)
            if linked and line.entry == self.chosen
        ]
        parts.append(f'<g {scaled} class="lines">{"".join(lines)}{"".join(front)}</g>')
        height = float(HEIGHT)
        if not linked:
            parts += self.legend()
            height += 18 * len(self.lines)
        box = " ".join(map(str, (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)))
        data = ("box", box), ("x", ends(self.x)), ("y", ends(self.y)), ("says", self.says), ("chosen", f"{self.chosen}")
        return Drawing(WIDTH, height, "\n".join(parts), data if self.says and linked else ())

    def axes(self) -> Iterator[str]:
        for value, text in self.y.ticks:
            y = self.down(value)
            yield mark("path", kind="grid", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
            yield mark("text", safe(text), x=LEFT - 8, y=y + 4, text_anchor="end")
        for y in map(self.down, self.marks):
            yield mark("path", kind="mark", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
        for value, text in self.x.ticks:
            yield mark("text", safe(text), x=self.across(value), y=HEIGHT - BOTTOM + 17, text_anchor="middle")
        yield mark("path", kind="axis", d=f"M{LEFT} {HEIGHT - BOTTOM + 0.5}H{WIDTH - RIGHT}")
        middle = (LEFT + WIDTH - RIGHT) / 2
        yield mark("text", safe(self.x.label), x=middle, y=HEIGHT - 5, text_anchor="middle")
        if self.y.label:
            turned = f"translate(10 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)"
            yield mark("text", safe(self.y.label), kind="y", transform=turned, text_anchor="middle")

    def across(self, value: float) -> float:
        return LEFT + self.x.part(value) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return TOP + (1 - self.y.part(value)) * (HEIGHT - TOP - BOTTOM)

    def path(self, line: Line, at: int, faint: bool, alone: bool) -> str:
        """A line as one path of whole units, each point by its distance from the one before."""
        units = [(round(FINE * self.across(x)), round(FINE * self.down(y))) for x, y in line.points]
        steps = [f"{x - a} {y - b}" for (a, b), (x, y) in pairwise(units)]
        start = "M{} {}".format(*units[0]) if units else "M0 0"
        d = start + ("l" + " ".join(steps).replace(" -", "-") if steps else "")
        kind = "l" if faint else "s chosen" if line.entry is not None else f"s s{at % len(SERIES)}"
        title = None if line.entry is not None and not alone else mark("title", safe(line.label))
        entry = None if alone or not faint else line.entry
        return mark("path", title, kind=kind, data_e=entry, d=d)

    def legend(self) -> Iterator[str]:
        for at, line in enumerate(self.lines):
            y = HEIGHT + 18 * at + 4
            yield mark("rect", kind=f"s{at % len(SERIES)}", x=LEFT, y=y, width=14, height=3)
            yield mark("text", safe(fitted(line.label, LONGEST)), x=LEFT + 22, y=y + 6)


def ends(axis: Axis) -> str:
    """An axis as the script of a page reads it."""
    return f"{axis.low:.6g} {axis.high:.6g} {int(axis.log)}"


def thinned(points: Sequence[tuple[float, float]], most: int) -> tuple[tuple[float, float], ...]:
    """So many of some points, the first and the last among them."""
    if len(points) <= most:
        return tuple(points)
    most = max(2, most)
    return tuple(points[round(at * (len(points) - 1) / (most - 1))] for at in range(most))
