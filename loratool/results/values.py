"""What `inspect --values` measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loratool.grouping import by_key
from loratool.notes import Note
from loratool.results.base import Cost
from loratool.results.text import COLUMNS, aligned, cost_rows, figure, fill, row_if, table
from loratool.shown import size
from loratool.templates import common_start

LAST_WORDS = re.compile(r".*_\d+_(?=\D)|_\d+$")  # what of a name without dots tells where it is, not what
BY_NAME = "medians by name, with the ranks that keep a given fraction of ‖ΔW‖²"
ON_BASE = "medians against the base; unchanged: fraction of the entries that do not change after rounding to its dtype"
MOST_MODULES = 12  # rows of the table of modules before the rest is counted


@dataclass(frozen=True)
class MeasuredOnBase:
    """ΔW against W0, the rows and columns of the base that it lands on."""

    tensor: str  # of the base; the first of several
    dtype: str
    rows: int
    norm: float  # ‖W0‖, Frobenius
    ratio: float | None  # ‖ΔW‖ / ‖W0‖; None where W0 is zero
    amplification: float | None  # ‖ΔW‖ / ‖UᵀW0V‖, U and V those of ΔW (Hu et al. 2021, section 7.3)
    unchanged: float | None  # part of the entries that are the same after W0 + ΔW is rounded to the base's dtype
    gain: float | None  # ⟨rounded − W0, ΔW⟩ / ‖ΔW‖²: 1 where the update comes through whole
    sampled_rows: int  # that `unchanged` and `gain` were measured on


@dataclass(frozen=True)
class Measured:
    """ΔW = s·BA of one module, s included. Of experts: norms of all together, ranks as means, energies added up."""

    target: str
    rank: int  # of the factors
    norm: float | None  # Frobenius; None for all that follow where a value is no number
    spectral: float | None  # the largest singular value
    stable_rank: float | None  # ‖ΔW‖² / σ₁²; None for a zero update, as all ranks
    entropy_rank: float | None  # exp(−Σ p ln p), p = σ/Σσ (Roy and Vetterli 2007)
    condition: float | None  # σ₁ / σ_r; None where σ_r is nothing but rounding
    energy_ranks: tuple[int, ...] | None  # the smallest ranks that keep 90, 95 and 99 % of ‖ΔW‖²
    dead: int | None  # components below 1e-6 of σ₁
    zero_rows: int  # of A
    zero_columns: int  # of B
    balance: float | None  # ‖B‖ / ‖A‖, as stored; None where A is zero
    nonfinite: int  # values that are no number, or infinite
    subnormal: int  # values below the normal range of the dtype they are stored in
    singular_values: tuple[float, ...]  # falling; at most 1024
    weight: MeasuredOnBase | None = None  # against the base


@dataclass(frozen=True)
class Suggestion:
    """What to keep for a part of ‖ΔW‖² of all modules together."""

    energy: float
    rank: int  # the smallest that keeps it where every module gets it
    bytes: int  # of the factors then, in the dtype they have
    bytes_by_layer: int  # where each module gets the smallest rank that keeps that part of it
    bytes_now: int

    def __str__(self) -> str:
        now, by_layer = f"{size(self.bytes)} of {size(self.bytes_now)}", size(self.bytes_by_layer)
        return f"rank {self.rank}: {now}; with a rank per layer: {by_layer}"


@dataclass(frozen=True)
class Values:
    """What `inspect` measures."""

    norm: float  # of all modules together
    modules: tuple[Measured, ...]
    suggestions: tuple[Suggestion, ...]  # for 90, 95 and 99 %; none where every update is zero
    norm_base: float | None  # ‖W0‖ of the weights that are changed, with a base
    skipped: Mapping[str, str]  # target → why it is not measured
    cost: Cost
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        """Norms and ranks: by name of module, then the modules that change most, and what to make of it."""
        norm_base = self.norm_base or 0.0
        ratio = self.norm / (norm_base or 1.0)
        bad = [m for m in self.modules if m.nonfinite][:MOST_MODULES]
        small = [m.subnormal for m in self.modules if m.subnormal]
        rows: list[tuple[str, object]] = [
            ("‖ΔW‖", f"{self.norm:.6g}, all {len(self.modules)} modules together"),
            *row_if(norm_base, "‖W0‖", f"{norm_base:.6g} of the weights it changes: {100 * ratio:.3g} %"),
            *((f"{100 * kept.energy:.0f} % energy", kept) for kept in self.suggestions),
            *(("not finite", f"{m.nonfinite} values in {m.target}") for m in bad),
            *row_if(small, "subnormal", f"{sum(small):,} values in {len(small)} modules"),
            *(("not measured", f"{target}: {why}") for target, why in [*self.skipped.items()][:MOST_MODULES]),
            *cost_rows(self.cost),
            *(("note", note) for note in self.notes),
        ]
        parts = [aligned(rows, COLUMNS)]
        if self.modules:
            from loratool.results.blocks import bars, is_of_images  # which knows the blocks of all layouts

            parts += [medians(BY_NAME, self.modules, SIZES), largest(self.modules)]
            if is_of_images(m.target for m in self.modules):
                parts.append(bars({m.target: m.norm or 0.0 for m in self.modules}))
        if weighed := [m for m in self.modules if m.weight]:
            parts.append(medians(ON_BASE, weighed, AGAINST))
        return "\n\n".join(parts)


Column = tuple[str, Callable[["Measured"], "float | None"]]
SIZES: tuple[Column, ...] = (
    ("‖ΔW‖", lambda m: m.norm),
    ("σ₁", lambda m: m.spectral),
    ("stable", lambda m: m.stable_rank),
    ("entropy", lambda m: m.entropy_rank),
    ("90 %", lambda m: m.energy_ranks[0] if m.energy_ranks else None),
    ("95 %", lambda m: m.energy_ranks[1] if m.energy_ranks else None),
    ("99 %", lambda m: m.energy_ranks[2] if m.energy_ranks else None),
    ("dead", lambda m: m.dead),
    ("‖B‖/‖A‖", lambda m: m.balance),
)
AGAINST: tuple[Column, ...] = (
    ("‖ΔW‖/‖W0‖", lambda m: m.weight.ratio if m.weight else None),
    ("amplified", lambda m: m.weight.amplification if m.weight else None),
    ("unchanged", lambda m: m.weight.unchanged if m.weight else None),
    ("gain", lambda m: m.weight.gain if m.weight else None),
)


def medians(about: str, modules: Sequence[Measured], columns: Sequence[Column]) -> str:
    """Medians of the modules of each name."""
    rows = [
        [*(figure(middle([of(m) for m in members])) for _, of in columns), f"{name} ×{len(members)}"]
        for name, members in named(modules).items()
    ]
    return f"{fill(about)}\n{table([*(head for head, _ in columns), 'name'], rows, room=COLUMNS)}"


def largest(modules: Sequence[Measured]) -> str:
    """The modules that change most, by what their names do not have in common."""
    ordered = sorted(modules, key=lambda m: -(m.norm or 0.0))[:MOST_MODULES]
    shown = [SIZES[at] for at in (0, 1, 2, 4, 5, 6)]
    names = [m.target.removesuffix(".weight") for m in ordered]
    start = common_start(names)
    rows = [
        [*(figure(column(m)) for _, column in shown), name.removeprefix(start)]
        for m, name in zip(ordered, names, strict=True)
    ]
    header = [*(h for h, _ in shown), "largest updates" + (f", in {start.rstrip('.')}" if start else "")]
    return table(header, rows, len(modules) - len(ordered), COLUMNS)


def named(modules: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Modules by the last part of their path."""
    return by_key((last_words(m.target), m) for m in modules)


def last_words(target: str) -> str:
    """The last part of a target's path, which says what it is and not where."""
    module = target.removesuffix(".weight")
    return module.rpartition(".")[2] if "." in module else LAST_WORDS.sub("", module)


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    from statistics import median

    return median(known) if known else None
