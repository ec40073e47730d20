"""What a merge would do: `merge --dry-run` prints it, and `loratool.plan` returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.errors import printable
from loratool.files.safefile import TensorInfo
from loratool.grouping import by_key
from loratool.notes import Note
from loratool.results.base import SCHEMA, Cost, Result, plain
from loratool.results.merge import gain_row
from loratool.results.simulation import Simulation, simulation_text
from loratool.results.text import MOST_LINES, aligned, plural, row_if
from loratool.shown import size
from loratool.templates import first_few, grouped, listed, template_of


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter that would be merged."""

    name: str
    weight: float
    updates: int


@dataclass(frozen=True)
class PlannedEdit:
    """What an adapter would change."""

    adapter: str
    target: str
    rule: str  # by which the weight was found in the base
    tensor: str
    part: str  # rows and columns, as a slice; empty for all of them


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """What a merge would do. Sizes are bytes."""

    base: str
    adapters: tuple[PlannedAdapter, ...]
    edits: tuple[PlannedEdit, ...]
    copied: int  # tensors carried over byte for byte
    plain: tuple[str, ...]  # weights that are packed in the base and plain in the output
    requantized: tuple[str, ...]  # edited weights that are packed in the output too
    bytes_read: int
    bytes_written: int
    bytes_read_again: int  # of the output, where it is compared with its digests or gets the SHA-256 of whole files
    gain_forecast: float | None = None  # the part of the updates that rounding is expected to leave
    gains_forecast: Mapping[str, float] = field(default_factory=dict)  # the same by module
    peak_memory: int
    files: Mapping[str, int]  # weight file → its size
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    simulations: tuple[Simulation, ...] = ()  # as many as numbers of workers were asked for
    notes: tuple[Note, ...]
    cost: Cost  # of planning


@dataclass(frozen=True)
class SourceFile:
    """A file that a tensor is read from."""

    path: Path


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    placed: TensorInfo  # in the output
    file: str  # of the output
    at: int  # the byte of that file where it begins
    shape: tuple[int, ...]  # of the weight, which differs from the tensor's where that is packed
    source: SourceFile
    edits: tuple[PlannedEdit, ...]
    adapters: tuple[int, ...]  # which of the plan's each edit is of; several may have one name


@dataclass(frozen=True, kw_only=True, repr=False)
class MergePlan(Result, PlanTable):
    """What a merge would do, with more than `--json` prints. Sizes are bytes."""

    base_files: int
    spans: tuple[PlannedTensor, ...]  # in the order of the output's files, and of their bytes
    rounding: str
    packing: str  # how the base is quantised, in words; empty where it is not
    left_packed: int  # weights that stay as they are packed in the base
    decoded: Mapping[str, Sequence[str]]  # dtype → the weights that are decoded into it

    @cached_property
    def edited(self) -> tuple[PlannedTensor, ...]:
        return tuple(span for span in self.spans if span.edits)

    def to_dict(self) -> dict[str, Any]:
        """What `loratool merge --dry-run --json` prints; `peak_memory` is that of a merge with these settings."""
        return {"schema": SCHEMA, **{each.name: plain(getattr(self, each.name)) for each in fields(PlanTable)}}

    def __str__(self) -> str:
        """What a merge would do, for people."""
        gain, files = (
            self.gain_forecast,
            f"{plural(len(self.files), 'weight file')} and {plural(len(self.side_files), 'other file')}",
        )
        rows: list[tuple[str, object]] = [
            ("base", f"{self.base}: {plural(self.base_files, 'file')}, {plural(len(self.spans), 'tensor')}"),
            *(("adapter", f"{a.name}: {plural(a.updates, 'update')}, weight {a.weight:g}") for a in self.adapters),
            ("would edit", f"{plural(len(self.edited), 'tensor')}, copy {self.copied}"),
            *row_if(self.packing, "quantised", f"{self.packing}; stay as they are: {self.left_packed}"),
            *row_if(
                self.packing and self.requantized, "requantised", f"{len(self.requantized)}: {listed(self.requantized)}"
            ),
            *(("become plain", f"{len(own)} in {dtype}: {listed(own)}") for dtype, own in self.decoded.items()),
            ("would read", size(self.bytes_read)),
            ("would write", f"{size(self.bytes_written)} in {files}"),
            *row_if(self.bytes_read_again, "would read again", f"{size(self.bytes_read_again)} of the output"),
            ("peak memory", f"about {size(self.peak_memory)}"),
            ("disk needed", size(self.bytes_written)),
            *([gain_row("gain forecast", gain, self.gains_forecast)] if gain is not None else []),
            *(("left out", name) for name in self.left_out),
            *(("note", note) for note in self.notes),
        ]
        listing = edit_lines(self)
        if len(listing) > MOST_LINES:
            listing = [*listing[:MOST_LINES], f"… and {len(listing) - MOST_LINES} more patterns"]
        shown = "\n".join([aligned(rows), "edits:", *(f"  {line}" for line in listing)])
        return f"{shown}\n\n{simulation_text(self.simulations)}" if self.simulations else shown


def edit_lines(plan: MergePlan) -> list[str]:
    """*adapter's name → rule → tensor[rows]*; edits that differ in numbers alone share a line.

    Rows are those of the tensor seen as a matrix, and shown for the first of a line where they differ.
    """
    parts: dict[tuple[int, str, str, str, str], list[str]] = {}
    for span in plan.edited:
        about = f"{'×'.join(map(str, span.shape))} {span.placed.dtype}"
        for adapter, edit in zip(span.adapters, span.edits, strict=True):
            parts.setdefault((adapter, edit.target, edit.rule, span.placed.name, about), []).append(edit.part)
    lines = by_key(
        (
            (adapter, template_of(target)[0], rule, template_of(tensor)[0], about),
            (target.removesuffix(".weight"), tensor, first_few(where, 2)),
        )
        for (adapter, target, rule, tensor, about), where in parts.items()
    )

    def line(like: tuple[int, str, str, str, str], members: Sequence[tuple[str, str, str]]) -> str:
        targets, tensors = (grouped(dict.fromkeys(m[side] for m in members)) for side in (0, 1))
        rows = members[0][2] + (", …" if any(m[2] != members[0][2] for m in members) else "")
        whose = f"{plan.adapters[like[0]].name}: " if len(plan.adapters) > 1 else ""
        found = " + ".join(map(printable, tensors)) + (f"[{rows}]" if rows else "")
        return f"{whose}{' + '.join(map(printable, targets))} → {like[2]} → {found}  {like[4]}  ×{len(members)}"

    return [line(like, members) for like, members in lines.items()]
