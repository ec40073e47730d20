"""What `compress` and `expand` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result, Written
from loratool.results.text import MOST_LAYERS, aligned, cost_rows, counts, percent, spread, table, worst_first
from loratool.shown import size


@dataclass(frozen=True)
class CompressedModule:
    """One module. Errors are ‖ΔW − ΔW'‖ / ‖ΔW‖ of its adapters, Frobenius."""

    clusters: tuple[tuple[str, ...], ...]  # adapters that share directions; one alone shares none
    directions: tuple[int, ...]  # of each cluster, a side; of one alone its rank
    errors: Mapping[str, float]  # by adapter, of what is stored
    truncated: Mapping[str, float]  # by adapter, where truncation spends the same bytes on all modules


@dataclass(frozen=True)
class CompressedAdapter:
    """One adapter, all modules together."""

    file: str
    bytes_before: int  # of its factors
    bytes: int  # of its own file's factors and cores
    norm: float  # ‖ΔW‖
    error: float
    truncated: float  # the error of truncation at equal bytes
    worst: str  # the module with the largest error
    worst_error: float


@dataclass(frozen=True)
class CompressedTotals:
    """All adapters; errors are root mean squares over them."""

    bytes_before: int
    bytes_shared: int
    bytes: int  # of all files together
    error: float
    truncated: float
    pays: bool  # whether any directions are shared
    price: float  # the least of ω‖ΔW‖² that a byte, or a parameter, of a triple keeps


@dataclass(frozen=True, repr=False)
class CompressReport(Result):
    """What `compress` did. Sizes are bytes of tensors, times seconds."""

    out: Path
    written: bool
    rule: str
    totals: CompressedTotals
    adapters: Mapping[str, CompressedAdapter]
    modules: Mapping[str, CompressedModule]  # by target
    dtype: str  # of bases and triples; cores are float32
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        totals = self.totals
        rows: list[tuple[str, object]] = [
            ("compressed into" if self.written else "would write", printable(self.out)),
            ("rule", self.rule),
            ("adapters", len(self.adapters)),
            ("factors", f"{size(totals.bytes)} (was {size(totals.bytes_before)}), {self.dtype}, cores float32"),
            ("shared part", size(totals.bytes_shared)),
            ("error", f"{percent(totals.error)} of ‖ΔW‖ as stored"),
            ("by truncation", f"{percent(totals.truncated)} of ‖ΔW‖ in as many bytes"),
            ("directions", spread(counts(d for m in self.modules.values() for d in m.directions))),
            *cost_rows(self.cost),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join([aligned(rows), adapters_table(self.adapters), modules_table(self.modules)])


def adapters_table(adapters: Mapping[str, CompressedAdapter]) -> str:
    """A table of adapters, those that lose most first."""
    worst = sorted(adapters.items(), key=lambda item: -item[1].error)
    cells = [
        [
            percent(one.error),
            percent(one.truncated),
            size(one.bytes),
            percent(one.worst_error),
            printable(name),
        ]
        for name, one in worst[:MOST_LAYERS]
    ]
    return table(["error", "truncated", "own file", "worst module", "adapter"], cells, len(worst) - MOST_LAYERS)


def modules_table(modules: Mapping[str, CompressedModule]) -> str:
    """A table of modules, those that lose most first."""

    def error(module: CompressedModule) -> float:
        return max(module.errors.values(), default=0.0)

    return worst_first(
        ["cluster sizes", "directions", "largest error", "truncated", "module"],
        modules,
        error,
        lambda module: [
            spread(counts(map(len, module.clusters))),
            spread(counts(module.directions)),
            percent(error(module)),
            percent(max(module.truncated.values(), default=0.0)),
        ],
    )


@dataclass(frozen=True, repr=False)
class ExpandReport(Written):
    """What `expand` did."""

    out: Path
    written: bool
    name: str
    dialect: str
    ranks: Mapping[str, int]  # by target
    dtype: str
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What was written."""
        return aligned(
            [
                ("expanded into" if self.written else "would write", printable(self.out)),
                ("adapter", printable(self.name)),
                ("dialect", self.dialect),
                ("rank", spread(counts(self.ranks.values()))),
                ("dtype", self.dtype),
                *cost_rows(self.cost),
                *(("note", note) for note in self.notes),
            ]
        )
