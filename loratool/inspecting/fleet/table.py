"""`table_of()`: many adapters as one table; `rows_of()`: the same row by row, as they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratool.arguments import PathLike, Progress
from loratool.errors import InputError, UsageError, printable
from loratool.fetching import check_there, headers, local
from loratool.inspecting.fleet.conditions import conditions, sorted_by
from loratool.inspecting.fleet.members import members
from loratool.inspecting.fleet.rows import Reader
from loratool.inspecting.neighbours import Index, Sketched, is_same, nearest, read_index, twins
from loratool.inspecting.options import InspectOptions
from loratool.lazy import numpy as np
from loratool.results.base import Cost
from loratool.results.fleet import FleetFacts, FleetRow
from loratool.reworking.sketches import Sketch
from loratool.templates import first_few

OF_ONE = ("base_config", "metadata", "tensors", "device")  # options that show what a table has no room for, or the like


def table_of(operands: Sequence[PathLike], options: InspectOptions, progress: Progress | None = None) -> FleetFacts:
    """A row for each adapter that some operands mean; `loratool.commands.inspect` says all of it."""
    started = time.monotonic()
    wanted = conditions(options.where, options.values) if options.where is not None else ()
    sorted_by((), options.sort or "name", options.values)  # raises before anything is read
    found = Fleet(operands, options)
    rows = list(found.rows(progress))
    if options.values:
        rows = with_twins(rows, found.sketches)
    kept = [row for row in rows if all(condition.holds(row) for condition in wanted)]
    return FleetFacts(
        kind="fleet",
        path=first_few(operands, 4),
        adapters=tuple(sorted_by(kept, options.sort, options.values) if options.sort else kept),
        left_out=tuple(found.left_out),
        filtered=len(rows) - len(kept),
        sorted_by=options.sort or "",
        cost=Cost.since(started, "cpu" if options.values else ""),
    )


def rows_of(
    operands: Sequence[PathLike], options: InspectOptions, progress: Progress | None = None
) -> Iterator[FleetRow]:
    """The rows in the order in which they are read, each as soon as it is; twins are those that were read before."""
    if options.sort is not None:
        raise UsageError(
            "--sort and --jsonl are mutually exclusive: a stream is in the order in which adapters are read"
        )
    wanted = conditions(options.where, options.values) if options.where is not None else ()
    found = Fleet(operands, options)
    before: list[tuple[str, Sketched]] = []
    for read in found.rows(progress):
        row = with_earlier(read, found.sketches.get(read.name), before) if options.values else read
        if all(condition.holds(row) for condition in wanted):
            yield row


@dataclass
class Fleet:
    """The adapters that some operands mean, read one after the other."""

    operands: Sequence[PathLike]
    options: InspectOptions
    left_out: list[str] = field(default_factory=list)
    sketches: dict[str, Sketched] = field(default_factory=dict)  # by name
    needs_base: bool = False  # one of the sketches is another without the base

    def __post_init__(self) -> None:
        on_cpu = self.options.device == "cpu"  # on which tables are made
        if alone := [name for name in OF_ONE if self.options.is_given(name) and not (name == "device" and on_cpu)]:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in alone)
            raise UsageError(f"{flags}: for one adapter at a time, not for a table; name the adapter itself")

    def rows(self, progress: Progress | None = None) -> Iterator[FleetRow]:
        """A row for each adapter. Raises `InputError` where there is none."""
        found = members(self.operands)
        if alone := len(found) == 1 and found[0].named:  # of several, one that is not there is a row
            check_there(found[0].path)
        index = read_index(Path(self.options.near)) if self.options.near is not None else None
        (way,) = self.options.readings(1)
        with ExitStack() as stack:
            reader = Reader(self.options, way, self.base_at(stack))
            for number, member in enumerate(found, 1):
                read = reader.read_or_raise(member) if alone else reader.read(member)
                if read is None:
                    self.left_out.append(printable(member.name))
                else:
                    yield self.kept(*read, index)
                if progress:
                    progress(number, len(found))
        if len(self.left_out) == len(found):
            where = ", ".join(map(printable, self.operands[:4]))
            raise InputError(f"{where}: contains no adapter", [f"{name}: not an adapter" for name in self.left_out])

    def kept(self, row: FleetRow, sketch: Sketch | None, index: Index | None) -> FleetRow:
        """The row; its sketch is kept to be compared with others."""
        if sketch is None:
            return row
        self.sketches[row.name] = Sketched(sketch.values.astype(np.float32), sketch.facts)
        self.needs_base |= sketch.needs_base
        return replace(row, near=nearest(index, sketch, self.options.top)[0]) if index is not None else row

    def base_at(self, stack: ExitStack) -> Path | None:
        base = self.options.base
        if base is None:
            return None
        whole = self.options.values or self.options.check
        return local(base, "model") if whole else stack.enter_context(headers(base))


def with_twins(rows: Sequence[FleetRow], sketches: dict[str, Sketched]) -> list[FleetRow]:
    """The rows, each with the names of those that are the same update."""
    names = list(sketches)
    same: dict[str, list[str]] = {name: [] for name in names}
    others: dict[str, list[str]] = {name: [] for name in names}
    for i, j in twins(list(sketches.values())):
        equal = sketches[names[i]].facts.saved == sketches[names[j]].facts.saved
        for one, other in ((names[i], names[j]), (names[j], names[i])):
            (same if equal else others)[one].append(other)
    return [
        replace(row, same_as=tuple(sorted(same[row.name])), same_update_as=tuple(sorted(others[row.name])))
        if row.name in same
        else row
        for row in rows
    ]


def with_earlier(row: FleetRow, sketch: Sketched | None, before: list[tuple[str, Sketched]]) -> FleetRow:
    """The row with those of the rows before it that are the same update; it is one of them afterwards."""
    if sketch is None:
        return row
    found = [
        (name, other.facts.saved == sketch.facts.saved)
        for name, other in before
        if is_same(sketch.facts, other.facts, float(np.linalg.norm(sketch.values - other.values)))
    ]
    before.append((row.name, sketch))
    same = tuple(sorted(name for name, equal in found if equal))
    return replace(row, same_as=same, same_update_as=tuple(sorted(name for name, equal in found if not equal)))
