"""What `compare` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.algebra.lowrank.relations import Relation
from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.matrix import Join, Matrix, matrix_lines
from loratool.results.text import MOST_LAYERS, aligned, kept, number, plural, shortened, table

FEW = 3  # up to this many adapters, every pair is shown
LEAST_KEPT = 4  # adapters of which a forecast is shown
REASONS = {
    "same": "the same update, cosine",
    "opposed": "they undo each other, cosine",
    "alike": "alike, cosine",
    "shared-directions": "unlike, but in the same directions, overlap",
}


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


@dataclass(frozen=True)
class Notable:
    """A pair worth knowing about."""

    pair: str
    why: str  # a key of REASONS
    value: float  # the cosine, or of shared-directions the overlap


@dataclass(frozen=True)
class Forecast:
    """What the sum of all adapters with weight 1 would keep, without making it (`combine --method svd`)."""

    rank: int | None  # that was asked for; None: in each layer the adapters' largest
    energy_kept: Mapping[str, float | None]  # part of each adapter's ‖ΔW‖² in the spaces of the result
    sum_kept: float | None  # part of the sum's own ‖ΔW‖²
    interference: float | None  # of all together as TSV defines it, the mean over layers


@dataclass(frozen=True, repr=False)
class CompareReport(Result):
    """What `compare` found. Pairs are named "one × other"."""

    adapters: tuple[str, ...]
    norms: Mapping[str, float]  # ‖ΔW‖ of each adapter, all layers together
    spectra: Mapping[str, tuple[float, ...]]  # adapter → √Σσᵢ² over its layers, by i: what cuts to each rank would keep
    totals: Mapping[str, PairTotals]
    modules: Mapping[str, Mapping[str, Relation]]  # target → pair; empty for many adapters without `pairs`
    alone: Mapping[str, tuple[str, ...]]  # adapter → layers that no other has
    matrix: Matrix
    tree: tuple[Join, ...]  # how adapters cluster, by average linkage
    notable: tuple[Notable, ...]
    forecast: Forecast
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        """How adapters are related: a matrix of many, or every pair and the layers where they overlap most."""
        alone = [
            f"{plural(len(targets), 'layer')} {'is' if len(targets) == 1 else 'are'} in {name} only"
            for name, targets in self.alone.items()
        ]
        rows: list[tuple[str, object]] = [
            *(("‖ΔW‖", f"{value:.4g}  {name}") for name, value in self.norms.items() if self.modules),
            *(("alone", line) for line in shortened(alone, MOST_LAYERS)),
            *(("note", line) for line in shortened([*map(str, self.notes)], MOST_LAYERS)),
        ]
        if self.modules:
            pairs = [f"{pair}\n{self.layers_of(pair)}" for pair in self.totals]
        else:
            pairs = ["\n".join(matrix_lines(self.adapters, self.matrix, self.tree, self.forecast.energy_kept))]
        return "\n\n".join([*([aligned(rows)] if rows else []), *pairs, self.closing()])

    def layers_of(self, pair: str) -> str:
        """A table of two adapters: all layers together, then those where they overlap most."""
        totals = self.totals[pair]
        layers = {target: found[pair] for target, found in self.modules.items() if pair in found}
        nearest = sorted(layers, key=lambda target: -(layers[target].overlap_out or 0.0))[:MOST_LAYERS]
        cells = [
            [*related_cells(totals), f"all {totals.layers} layers" if totals.layers > 1 else "the only layer"],
            *([*related_cells(layers[target]), printable(target.removesuffix(".weight"))] for target in nearest),
        ]
        header = ["cosine", "norms", "overlap out (random)", "in (random)", "interference", "signs", "layer"]
        return table(header, cells, totals.layers - MOST_LAYERS)

    def closing(self) -> str:
        """The pairs worth knowing about, and the forecast."""
        found = self.forecast
        told = [f"{pair.pair}: {REASONS[pair.why]} {pair.value:.3f}" for pair in self.notable]
        pairs = shortened(told or ["no two are alike, opposed, or share directions"], 8)
        rank = "the adapters' rank" if found.rank is None else f"rank {found.rank}"
        least = sorted((value, name) for name, value in found.energy_kept.items() if value is not None)
        rows: list[tuple[str, object]] = [
            *(("pair", line) for line in pairs if len(self.adapters) > 2),
            ("interference", f"{number(found.interference)} for all together (0: no direction is shared)"),
            ("sum", f"at {rank} would keep {kept(found.sum_kept)} of its own energy"),
            *(("keeps", f"{kept(value)} of {name}") for value, name in least[:LEAST_KEPT]),
        ]
        if len(least) > LEAST_KEPT:
            rows[-1] = (
                "keeps",
                f"as much or more of the {len(least) - LEAST_KEPT + 1} others, up to {kept(least[-1][0])}",
            )
        return aligned(rows)


def related_cells(found: Relation | PairTotals) -> list[str]:
    return [
        number(found.cosine),
        number(found.norm_ratio),
        f"{number(found.overlap_out)} ({number(found.random_out)})",
        f"{number(found.overlap_in)} ({number(found.random_in)})",
        number(found.interference),
        number(found.sign_conflict),
    ]
