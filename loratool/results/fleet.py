"""A folder of adapters as a table: one row each, those that cannot be read too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypedDict

from loratool.grouping import by_key
from loratool.results.base import Result
from loratool.results.facts import OneFacts
from loratool.results.findings import Finding, worst
from loratool.results.history import Ancestor
from loratool.results.sketch import Neighbour, SketchFacts, neighbours_text
from loratool.results.text import ENDLESS, counts, figure, fill, fitted, one_of, plural, shortened, table as text_of
from loratool.shown import size

OK = "ok"
MANY = 2  # different ranks or scales that a cell lists before it has their range
LONGEST_TARGETS = 20  # characters of a cell of targets
LONGEST_BASE = 24
# Columns that a narrow terminal does without, in this order.
SPARE = ("dialect", "date", "params", "alpha", "scale", "base", "targets", "size", "rank")


@dataclass(frozen=True)
class FleetRow:
    """One adapter of several; what it has several of, each different one once."""

    name: str  # its path in the folder that was named
    path: str
    dialect: tuple[str, ...] = ()
    method: str = ""  # LORA, LOHA …
    base: str = ""
    rank: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()  # α/r or α/√r
    targets: tuple[str, ...] = ()  # kinds of modules
    modules: int = 0
    parameters: int = 0
    bytes: int = 0
    dtype: tuple[str, ...] = ()
    date: str = ""  # of the file of weights, in UTC, as ISO 8601
    health: str = OK  # else the code of the first problem
    reason: str = ""  # the first problem in a sentence
    exit_code: int = 0  # what it alone would end the command with
    norm: float | None = None  # ‖ΔW‖; this and all that follows with `values`
    sketch: tuple[float, ...] | None = None
    sketched: SketchFacts | None = None
    same_as: tuple[str, ...] | None = None  # names of those with the same update and the same other tensors
    same_update_as: tuple[str, ...] | None = None  # of those whose other tensors differ
    near: tuple[Neighbour, ...] | None = None  # with an index
    findings: tuple[Finding, ...] | None = None  # of a check
    model: tuple[str, ...] = ()  # image and video models that its names and shapes fit, such as "SDXL"


FIELDS = tuple(each.name for each in fields(FleetRow))
OF_VALUES = ("norm", "same_as", "same_update_as")
LISTED = (
    *FIELDS[: FIELDS.index("exit_code")],
    *OF_VALUES,
    "model",
)  # what people filter and sort by, and the columns of CSV


@dataclass(frozen=True, repr=False)
class FleetFacts(Result):
    """A table of adapters."""

    kind: Literal["fleet"]
    path: str  # what was named
    adapters: tuple[FleetRow, ...]
    left_out: tuple[str, ...]  # models and other files of weights that are no adapters
    filtered: int = 0  # rows that a condition leaves out
    sorted_by: str = field(default="", compare=False)

    @property
    def findings(self) -> tuple[Finding, ...] | None:
        """Those of all adapters, of a check."""
        if all(row.findings is None for row in self.adapters):
            return None
        return tuple(finding for row in self.adapters for finding in row.findings or ())

    @property
    def history(self) -> Ancestor | None:
        """Of a table none is told; that of each adapter is told of it alone."""
        return None

    @property
    def exit_code(self) -> int:
        """The worst of all rows, which is the smallest other than 0."""
        return worst(row.exit_code for row in self.adapters)

    def __str__(self) -> str:
        """The table, grouped by base where no order was asked for, then what is wrong and what is twice there."""
        if self.sorted_by:
            tables = [table(self.adapters, with_base=True)]
        else:
            tables = [
                fill(f"{base}: {plural(len(rows), 'adapter')}", room=ENDLESS) + "\n" + table(rows)
                for base, rows in by_base(self.adapters).items()
            ]
        bad = [fill(f"{row.name}: {row.reason}", "", "    ") for row in self.adapters if row.reason]
        same = [
            fill(" = ".join(sorted(names)), f"same update{differ}: ", "    ")
            for names, differ in twins(self.adapters).items()
        ]
        near = [f"nearest to {row.name}\n{neighbours_text(row.near)}" for row in self.adapters if row.near is not None]
        parts = [*tables, "\n".join(bad), "\n".join(same), *near, "\n".join(self.summary())]
        return "\n\n".join(filter(None, parts))

    def summary(self) -> Iterator[str]:
        """How many there are."""
        bad = counted_health([row.health for row in self.adapters])
        total = size(sum(row.bytes for row in self.adapters))
        told = f"{plural(len(self.adapters), 'adapter')}, {total}" + (f", {bad}" if bad else "")
        yield fill(told + (f"; {self.filtered} filtered out" if self.filtered else ""), room=ENDLESS)
        if self.left_out:
            yield fill(", ".join(shortened(self.left_out, 4)), f"not adapters ({len(self.left_out)}): ", "    ")


def counted_health(words: Iterable[str]) -> str:
    """How many adapters have which problem, such as `2 unreadable, 1 untrained`; empty where all are well."""
    return ", ".join(f"{count} {word}" for word, count in counts(word for word in words if word != OK).items())


def by_base(rows: Sequence[FleetRow]) -> Mapping[str, list[FleetRow]]:
    """Rows by the base that they name; last those that name none, by the kind of model that they fit."""
    found = by_key(((not row.base, row.base or unnamed(row)), row) for row in rows)
    return {base: found[unknown, base] for unknown, base in sorted(found)}


def unnamed(row: FleetRow) -> str:
    """What is known of a base that is not named."""
    return f"base not named ({one_of(row.model)})" if row.model else "base not named"


def table(rows: Sequence[FleetRow], with_base: bool = False) -> str:
    """A line for each adapter, its name last and whole."""
    norms = any(row.norm is not None for row in rows)
    header = ["rank", "alpha", "scale", "targets", "params", "size", "date", *(["‖ΔW‖"] if norms else []), "health"]
    cells = [
        [
            *map(several, (row.rank, row.alpha, row.scale)),
            target_cell(row.targets),
            short_count(row.parameters),
            size(row.bytes) if row.bytes else "–",
            row.date[:10] or "–",
            *([figure(row.norm)] if norms else []),
            row.health,
            "+".join(row.dialect) or "–",
            *([base_cell(row)] if with_base else []),
            row.name,
        ]
        for row in rows
    ]
    return text_of([*header, "dialect", *(["base"] if with_base else []), "name"], cells, spare=SPARE)


def several(values: Sequence[float]) -> str:
    """`16`, `8,16`, or the range of many."""
    if not values:
        return "–"
    ordered = sorted(values)
    if len(ordered) > MANY:
        return f"{ordered[0]:.4g}–{ordered[-1]:.4g}"
    return ",".join(f"{value:.4g}" for value in ordered)


def target_cell(targets: Sequence[str]) -> str:
    """The kinds of modules, or how many kinds there are where their names take too much room."""
    text = ",".join(name.removesuffix("_proj") for name in targets)
    return (text if len(text) <= LONGEST_TARGETS else f"{len(targets)} kinds") or "–"


def base_cell(row: FleetRow) -> str:
    """The name of the base, else the kind of model in parentheses."""
    kind = f"({one_of(row.model)})" if row.model else "–"
    return fitted(row.base.rpartition("/")[2] or kind, LONGEST_BASE)


def short_count(count: int) -> str:
    """A number of parameters: 221952 → 222k."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count) if count else "–"


def twins(rows: Sequence[FleetRow]) -> dict[frozenset[str], str]:
    """Each set of adapters that are the same update → in what they differ; empty for nothing."""
    found: dict[frozenset[str], str] = {}
    for row in rows:
        for differ, names in (("", row.same_as), (", other saved tensors", row.same_update_as)):
            if names:
                found.setdefault(frozenset([row.name, *names]), differ)
    return found


def csv_lines(rows: Sequence[FleetRow]) -> Iterator[str]:
    """The table as CSV, a line at a time; what a row has several of is joined by semicolons."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="")
    for line in (LISTED, *(csv_row(row) for row in rows)):
        writer.writerow(line)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


def csv_row(row: FleetRow) -> list[object]:
    values = (getattr(row, name) for name in LISTED)
    return [
        ";".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, tuple)
        else ""
        if value is None
        else value
        for value in values
    ]


class InspectTable(TypedDict):
    """One result per path, in order."""

    results: list[OneFacts | FleetFacts]
