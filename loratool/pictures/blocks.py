"""What a page consists of: numbers to begin with, groups of figures, tables, findings and facts, each as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.pictures.drawing import Figure, safe, svg_in_page
from loratool.results.text import figure

MOST_ROWS = 4000  # of a table; more would make a page that opens slowly
FILTERED = 12  # rows, from which a table can be filtered


@dataclass(frozen=True)
class Shown:
    """A cell whose text does not say how it is sorted, such as a size."""

    text: str
    key: float


Value = str | float | int | Shown | None


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and what it means."""

    name: str
    about: str = ""


class Block:
    """A part of a page."""

    def markup(self, name: str) -> str:
        """Its HTML; ids in it begin with `name`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tiles(Block):
    """The few numbers that a page begins with."""

    tiles: Sequence[tuple[str, str]]

    def markup(self, name: str) -> str:  # noqa: ARG002 (it has no ids)
        tiles = "\n".join(f"<div><dt>{safe(word)}</dt><dd>{safe(value)}</dd></div>" for word, value in self.tiles)
        return f'<dl class="tiles">\n{tiles}\n</dl>'


@dataclass(frozen=True)
class Facts(Block):
    """Names and what is to be said of them, in lines."""

    title: str
    facts: Sequence[tuple[str, object]]

    def markup(self, name: str) -> str:
        lines = "\n".join(f"<dt>{safe(word)}</dt><dd>{safe(value)}</dd>" for word, value in self.facts)
        return card(name, self.title, f'<dl class="facts">\n{lines}\n</dl>')


@dataclass(frozen=True)
class Message:
    """Something that was found: how grave, its code, a sentence, and a command that helps."""

    grave: bool
    code: str
    text: str
    repair: str = ""


@dataclass(frozen=True)
class Messages(Block):
    """What was found, one below the other."""

    title: str
    messages: Sequence[Message]

    def markup(self, name: str) -> str:
        return card(name, self.title, "\n".join(map(self.one, self.messages)))

    def one(self, message: Message) -> str:
        repair = f"<code>{safe(message.repair)}</code>" if message.repair else ""
        kind = "finding problem" if message.grave else "finding"
        return f'<div class="{kind}"><p><span class="badge">{safe(message.code)}</span>{safe(message.text)}</p>{repair}</div>'


@dataclass(frozen=True)
class Group(Block):
    """Figures under one heading."""

    title: str
    about: str
    figures: Sequence[Figure]
    chooses: bool = False  # whether the reader may colour the first one by any column of the linked table

    def markup(self, name: str) -> str:
        pairs = len(self.figures) > 1 and not any(each.wide for each in self.figures)
        figures = "\n".join(self.one(each, f"{name}-{at}") for at, each in enumerate(self.figures))
        about = self.about or (self.figures[0].about if len(self.figures) == 1 else "")
        select = '<select class="metric" aria-label="number shown as colour" hidden></select>' if self.chooses else ""
        return card(
            name, self.title, f'<div class="{"pair" if pairs else "figures"}">\n{figures}\n</div>', about, select
        )

    def one(self, each: Figure, name: str) -> str:
        hidden = ' class="unseen"' if len(self.figures) == 1 else ""
        return (
            f'<figure><figcaption id="{name}"{hidden}>{safe(each.title)}</figcaption>'
            f'<div class="scroll" tabindex="0" role="group" aria-labelledby="{name}">{svg_in_page(each, name)}</div></figure>'
        )


@dataclass(frozen=True)
class Table(Block):
    """Rows under headings that sort them. The first column names the rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    about: str = ""
    linked: bool = False  # whether entries of figures are its rows
    plain: bool = False  # few rows, whose order means something

    def markup(self, name: str) -> str:
        numeric = [all(not isinstance(row[at], str) for row in self.rows) for at in range(len(self.columns))]
        heads = "".join(self.head(each, is_number) for each, is_number in zip(self.columns, numeric, strict=True))
        rows = "\n".join(row_of(row, numeric) for row in self.rows[:MOST_ROWS])
        kind = "small" if self.plain else "linked" if self.linked else "sorted"
        table = (
            f'<div class="table" tabindex="0" role="group" aria-labelledby="{name}"><table class="{kind}">'
            f'<caption class="unseen">{safe(self.title)}</caption>\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        )
        more = len(self.rows) - MOST_ROWS
        about = " ".join(
            filter(None, [self.about, f"The last {more:,} rows are left out; --json has all." if more > 0 else ""])
        )
        can_filter = not self.plain and len(self.rows) > FILTERED
        tools = (
            '<input type="search" placeholder="filter by name" aria-label="filter by name" hidden>'
            if can_filter
            else ""
        )
        return card(name, self.title, table, about, tools)

    def head(self, column: Column, is_number: bool) -> str:
        """A heading; the style sheet puts numbers to the right, and marks the order."""
        about = f' title="{safe(column.about)}"' if column.about else ""
        text = safe(column.name)
        inner = text if self.plain else f'<button type="button"{about}>{text}</button>'
        return f'<th scope="col"{"" if is_number else " class=t"}>{inner}</th>'


def row_of(row: Sequence[Value], numeric: Sequence[bool]) -> str:
    """A row. HTML lets the ends of cells be left out, which thousands of them are smaller for."""
    cells = "".join(cell_of(value, is_number) for value, is_number in zip(row[1:], numeric[1:], strict=True))
    return f'<tr><th scope="row">{text_of(row[0])}</th>{cells}'


def cell_of(value: Value, is_number: bool) -> str:
    kind = "" if is_number else " class=t"
    key = f' data-v="{value.key:.6g}"' if isinstance(value, Shown) else ""
    return f"<td{kind}{key}>{text_of(value)}"


def text_of(value: Value) -> str:
    """A cell as text."""
    if value is None:
        return "–"
    if isinstance(value, Shown):
        return safe(value.text)
    if isinstance(value, float):
        return figure(value, 4)
    return safe(f"{value:,}" if isinstance(value, int) else value)


def card(name: str, title: str, body: str, about: str = "", tools: str = "") -> str:
    """A part with its heading, what is to be said of it, and what the reader may do with it."""
    told = f'<p class="hint">{safe(about)}</p>' if about else ""
    return (
        f'<section class="card" aria-labelledby="{name}">\n'
        f'<div class="head"><div><h2 id="{name}">{safe(title)}</h2>{told}</div>{tools}</div>\n{body}\n</section>'
    )
