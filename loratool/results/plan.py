"""What `merge --dry-run --json` prints."""

from __future__ import annotations

from typing import TypedDict

from loratool.notes import Note
from loratool.results.base import Cost
from loratool.results.simulation import Simulation


class PlannedAdapter(TypedDict):
    """An adapter that would be merged."""

    name: str
    weight: float
    updates: int


class PlannedEdit(TypedDict):
    """What an adapter would change."""

    adapter: str
    target: str
    rule: str  # by which the weight was found in the base
    tensor: str
    part: str  # rows and columns, as a slice; empty for all of them


class PlanTable(TypedDict):
    """What a merge would do. Sizes are bytes."""

    base: str
    adapters: list[PlannedAdapter]
    edits: list[PlannedEdit]
    copied: int  # tensors carried over byte for byte
    plain: list[str]  # weights that are packed in the base and plain in the output
    requantized: list[str]  # edited weights that are packed in the output too
    bytes_read: int
    bytes_written: int
    bytes_read_again: int  # of the output, where it is compared with its digests or gets the SHA-256 of whole files
    gain_forecast: float | None  # the part of the updates that rounding is expected to leave
    gains_forecast: dict[str, float]  # the same by module
    peak_memory: int
    files: dict[str, int]  # weight file → its size
    side_files: list[str]
    left_out: list[str]
    simulations: list[Simulation]  # as many as numbers of workers were asked for
    notes: list[Note]
    cost: Cost  # of planning


class PlannedOutput(PlanTable):
    """What one of several merges would do."""

    out: str
