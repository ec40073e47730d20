"""What `compare` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.algebra.lowrank.relations import Relation
from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import MOST_LAYERS, aligned, number, table


@dataclass(frozen=True)
class Meeting:
    """The part of a `Relation` that says how much two adapters are in each other's way."""

    cosine: float | None
    overlap_out: float | None  # of output directions; `random_out` is that of random subspaces
    random_out: float
    overlap_in: float | None
    random_in: float
    interference: float | None
    sign_conflict: float | None


@dataclass(frozen=True)
class PairTotals:
    """Two adapters, all layers that both have together; overlaps and conflicts are means over those layers."""

    layers: int  # that both have
    cosine: float | None
    norm_ratio: float | None
    overlap_out: float | None
    random_out: float | None
    overlap_in: float | None
    random_in: float | None
    clash: float | None
    transfer: float | None
    interference: float | None
    sign_conflict: float | None
    weighted_conflict: float | None


@dataclass(frozen=True, repr=False)
class CompareReport(Result):
    """What `compare` found. Pairs are named "one × other"."""

    adapters: tuple[str, ...]
    norms: Mapping[str, float]  # ‖ΔW‖ of each adapter, all layers together
    totals: Mapping[str, PairTotals]
    modules: Mapping[str, Mapping[str, Relation]]  # target → pair
    alone: Mapping[str, tuple[str, ...]]  # adapter → layers that no other has
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        """How adapters lie to each other: every pair in all, then the layers where they overlap most."""
        rows: list[tuple[str, object]] = [("‖ΔW‖", f"{value:.4g}  {name}") for name, value in self.norms.items()]
        rows += [("alone", f"{len(targets)} layers are in {name} only") for name, targets in self.alone.items()]
        rows += [("note", note) for note in self.notes]
        lines = [aligned(rows)]
        header = ["cosine", "norms", "overlap out (random)", "in (random)", "interference", "signs", "layer"]
        for pair, totals in self.totals.items():
            cells = [
                [*related_cells(totals), f"all {totals.layers} layers"],
                *(
                    [*related_cells(found[pair]), printable(target.removesuffix(".weight"))]
                    for target, found in sorted(
                        ((t, f) for t, f in self.modules.items() if pair in f),
                        key=lambda item: -(item[1][pair].overlap_out or 0.0),
                    )[:MOST_LAYERS]
                ),
            ]
            lines += ["", pair, *table(header, cells, totals.layers - MOST_LAYERS)]
        return "\n".join(lines)


def related_cells(found: Relation | PairTotals) -> list[str]:
    return [
        number(found.cosine),
        number(found.norm_ratio),
        f"{number(found.overlap_out)} ({number(found.random_out)})",
        f"{number(found.overlap_in)} ({number(found.random_in)})",
        number(found.interference),
        number(found.sign_conflict),
    ]
