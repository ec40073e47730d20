"""Bars and heat maps in characters: figures of a page as a terminal shows them, as wide as it is.

A row of a figure is a name, its shares of the scale and a number in words: one share is a bar, several are heat cells.
Colours only repeat what the characters show, so that nothing is lost where there are none, or where the text is copied.
Packages that draw in terminals bring a whole layout engine and take longer to import than most commands run.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from loratool.errors import escaped
from loratool.pictures.bars import Bars
from loratool.pictures.drawing import Figure
from loratool.pictures.heat_map import HeatMap
from loratool.pictures.modules import NO_LAYER
from loratool.results.text import figure as in_digits, fitted, mean_of

LEAST_NAME, LEAST_BAR, LONGEST_BAR = 12, 10, 48  # characters
WIDEST_CELL = 4
MOST_ROWS = 24  # of a figure before the rest is counted
MOST_NUMBERS = 8  # columns of a map whose rows end with all their numbers
NUMBER = re.compile(r"\d+")
SHADES = "·░▒▓█"
EIGHTHS = "▏▎▍▌▋▊▉█"
PLAIN_SHADES, PLAIN_BAR = ".:+*#", "#"  # of consoles without blocks, such as those with code page 1252
# Of the 256 colours of a terminal: blue to yellow for what is positive, red for what is negative.
HEAT, COLD, BAR = (60, 61, 67, 73, 79, 149, 221), 167, 73


@dataclass(frozen=True)
class Row:
    """A line of a chart."""

    name: str
    shares: tuple[float | None, ...]  # 0 to 1, and as far as −1 where signs matter; None: nothing was measured
    value: str = ""  # in words, at the end of the row


@dataclass(frozen=True)
class Chart:
    """Rows below a title. `low` and `high` are the values that the shares 0 and 1 stand for."""

    title: str
    rows: tuple[Row, ...]
    low: str = ""
    high: str = ""


@dataclass(frozen=True)
class Terminal:
    """What somebody looks at: its columns, and whether it has colours and block characters."""

    width: int
    colours: bool
    blocks: bool


def terminal_of(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Terminal | None:
    """The terminal that a stream goes to; None for a file or a pipe.

    COLUMNS has the last word on the width, NO_COLOR and TERM=dumb on colours (https://no-color.org).
    """
    if not stream.isatty():
        return None
    try:
        (SHADES + EIGHTHS).encode(getattr(stream, "encoding", None) or "ascii")
        blocks = True
    except UnicodeError:
        blocks = False
    colours = not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    return Terminal(shutil.get_terminal_size().columns, colours, blocks)


def shown(figures: Iterable[Figure], terminal: Terminal) -> str:
    """Those of some figures that characters can show, as text with an empty line between two of them."""
    charts = (chart_of(each) for each in figures if isinstance(each, (Bars, HeatMap)) and not is_of_two(each))
    return "\n\n".join("\n".join(lines_of(chart, terminal)) for chart in charts if worth(chart))


def is_of_two(figure: Figure) -> bool:
    """Whether it is a matrix of two adapters, which is one number."""
    return isinstance(figure, HeatMap) and figure.numbers and len(figure.rows) <= 2


def worth(chart: Chart) -> bool:
    """Whether a chart compares anything: it has several rows or cells, and cells of more than one density."""
    cells = [share for row in chart.rows for share in row.shares if share is not None]
    are_bars = all(len(row.shares) == 1 for row in chart.rows)
    return len(cells) > 1 and (are_bars or len({step_of(share, len(SHADES)) for share in cells}) > 1)


def chart_of(figure: Bars | HeatMap) -> Chart:
    """A figure as rows."""
    if isinstance(figure, Bars):
        whole = figure.longest or max((sum(bar.values) for bar in figure.bars), default=0.0) or 1.0
        return Chart(figure.title, tuple(Row(bar.label, (sum(bar.values) / whole,), bar.text) for bar in figure.bars))
    low, high = figure.range()
    if figure.scale == "both" or len(figure.columns) == 1:  # signs, or bars: both begin at 0
        low = 0.0
    rows = (
        Row(
            name,
            tuple(None if value is None else (value - low) / ((high - low) or 1.0) for value in values),
            numbers(values) if figure.numbers and len(values) <= MOST_NUMBERS else in_digits(mean_of(values)),
        )
        for name, values in rows_of(figure)
    )
    layers = [column for column in figure.columns if column != NO_LAYER]
    across = f", {layers[0]} to {layers[-1]}" if len(layers) > 1 and not figure.numbers else ""
    return Chart(figure.title + across, tuple(rows), in_digits(low), in_digits(high))


def rows_of(figure: HeatMap) -> Iterator[tuple[str, list[float | None]]]:
    """The values of a map by row; of more rows than are shown, those of names that differ in numbers are one."""
    together = len(figure.rows) > MOST_ROWS and not figure.numbers
    found: dict[str, list[list[float | None]]] = {}
    for cell in figure.cells:
        name = NUMBER.sub("*", figure.rows[cell.row]) if together else figure.rows[cell.row]
        found.setdefault(name, [[] for _ in figure.columns])[cell.column].append(cell.value)
    for name, columns in found.items():
        yield name, [mean_of(values) for values in columns]


def numbers(values: Sequence[float | None]) -> str:
    """Numbers from −1 to 1, two digits each; there is no −0.00."""
    return " ".join("    –" if value is None else f"{round(value, 2) + 0.0:5.2f}" for value in values)


def lines_of(chart: Chart, terminal: Terminal) -> Iterator[str]:
    """A chart's title with its scale, then its rows; where they are too narrow for it all, without the values."""
    rows = chart.rows[:MOST_ROWS]
    cells = max((len(row.shares) for row in rows), default=0)
    least = min(2 * cells, terminal.width // 3) if cells > 1 else LEAST_BAR
    longest = max((len(escaped(row.name)) for row in rows), default=0)
    value = max((len(row.value) for row in rows), default=0)
    if min(longest, LEAST_NAME) + least + value + 4 > terminal.width:
        value = 0
    name = min(longest, max(LEAST_NAME, terminal.width - least - value - 4))
    room = max(4, terminal.width - name - value - (4 if value else 2))
    yield from title_lines(chart, cells, room, terminal)
    for row in rows:
        figure = cells_of(row.shares, room, terminal) if cells > 1 else bar(row.shares[0], room, terminal)
        end = f"  {row.value:>{value}}" if value else ""
        yield f"{fitted(escaped(row.name), name):<{name}}  {figure}{end}".rstrip()
    if len(chart.rows) > MOST_ROWS:
        yield f"… and {len(chart.rows) - MOST_ROWS} more"


def title_lines(chart: Chart, cells: int, room: int, terminal: Terminal) -> Iterator[str]:
    """The title, then what the shades mean where there is room for it, and that cells stand for several columns."""
    title = f"{chart.title}; a cell is the mean of {-(-cells // room)} columns" if cells > room else chart.title
    lines = textwrap.wrap(title, terminal.width)
    scale = ""
    if cells > 1 and chart.high:
        steps = [shade((at + 0.5) / len(SHADES), 1, terminal) for at in range(len(SHADES))]
        scale = f"{chart.low} {''.join(steps)} {chart.high}"
        length = len(chart.low) + len(SHADES) + len(chart.high) + 2
        if len(lines[-1]) + 3 + length <= terminal.width:
            lines[-1] += f"   {scale}"
            scale = ""
    yield from lines
    if scale:
        yield scale


def bar(share: float | None, room: int, terminal: Terminal) -> str:
    """A bar in a field of its own; what is not 0 has at least the thinnest."""
    length = min(room, LONGEST_BAR)
    part = min(1.0, max(0.0, share or 0.0))
    if terminal.blocks:
        eighths = max(round(8 * length * part), 1 if part else 0)
        text = "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")
    else:
        text = PLAIN_BAR * max(round(length * part), 1 if part else 0)
    return painted(text, BAR, terminal) + " " * (length - len(text))


def cells_of(shares: Sequence[float | None], room: int, terminal: Terminal) -> str:
    """Heat cells, as wide as there is room; neighbours share one where there are more of them than columns."""
    if len(shares) > room:
        each = -(-len(shares) // room)
        groups = [[s for s in shares[at : at + each] if s is not None] for at in range(0, len(shares), each)]
        shares = [sum(group) / len(group) if group else None for group in groups]
    width = max(1, min(WIDEST_CELL, room // max(1, len(shares))))
    return "".join(shade(share, width, terminal) for share in shares)


def shade(share: float | None, width: int, terminal: Terminal) -> str:
    """A heat cell: the larger the share, the denser. It is blank where nothing was measured; a minus is the sign."""
    if share is None:
        return " " * width
    size = min(1.0, abs(share))
    shades = SHADES if terminal.blocks else PLAIN_SHADES
    level = step_of(size, len(shades))
    text = shades[level] * width
    if share < 0 and level:
        text = "-" + text[1:]
    return painted(text, COLD if share < 0 and level else HEAT[step_of(size, len(HEAT))], terminal)


def step_of(size: float, steps: int) -> int:
    """In which of some equal steps from 0 to 1 a number is."""
    return min(steps - 1, int(size * steps))


def painted(text: str, colour: int, terminal: Terminal) -> str:
    return f"\x1b[38;5;{colour}m{text}\x1b[0m" if terminal.colours and text.strip() else text
