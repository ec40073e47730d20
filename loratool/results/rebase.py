"""What `rebase` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import aligned, cost_rows, figure, worst_first


@dataclass(frozen=True)
class BasePair:
    """One module, or all of them, in both bases: D = W₂ − W₁. None where a figure means nothing."""

    equal: bool  # the weights are the same
    relative: float | None  # ‖D‖ / ‖W₁‖
    over_update: float | None  # ‖D‖ / ‖ΔW‖
    cosine: float | None  # of W₁ and W₂
    c: float | None  # ⟨ΔW, D⟩ / ‖ΔW‖²: what W₂ holds of ΔW
    z: float | None  # the same in standard deviations of a D of no direction
    seen: float | None  # ‖D V‖ / ‖W₁ V‖ in the input directions of ΔW; `relative` for a D of no direction
    core: float | None  # how much of D lies in the directions of ΔW; 1 for a D of no direction
    factor: float  # what the update is multiplied by


@dataclass(frozen=True)
class RebasedBase:
    """One of the bases."""

    name: str
    sha256: Mapping[str, str]  # of its weight files


@dataclass(frozen=True, repr=False)
class RebaseReport(Written):
    """What `rebase` did. Times are seconds."""

    out: Path
    written: bool
    bases: tuple[RebasedBase, RebasedBase]  # from and onto
    total: BasePair  # all modules
    modules: Mapping[str, BasePair]  # by target
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What `rebase` did, the modules that differ most first."""
        total = self.total
        equal = sum(module.equal for module in self.modules.values())
        factor = "copied unchanged" if total.factor == 1 else f"multiplied by 1 − c = {total.factor:.4g}"
        rows: list[tuple[str, object]] = [
            ("rebased into" if self.written else "would write", printable(self.out)),
            ("from", lines_of(self.bases[0])),
            ("onto", lines_of(self.bases[1])),
            ("update", factor),
            ("modules", f"{len(self.modules)}, {equal} of them with equal weights"),
            ("bases", f"‖D‖/‖W‖ {figure(total.relative)}, ‖D‖/‖ΔW‖ {figure(total.over_update)}"),
            ("cosine", "–" if total.cosine is None else f"{total.cosine:.6f}"),
            ("c", f"{figure(total.c)} of ΔW is already in the new base (z = {figure(total.z)})"),
            *cost_rows(self.cost),
            *(("note", note) for note in self.notes),
        ]
        layers = worst_first(
            ["‖D‖/‖W‖", "‖D‖/‖ΔW‖", "cosine", "c", "z", "seen", "core", "module"],
            self.modules,
            lambda one: one.relative or 0.0,
            lambda one: [
                figure(one.relative),
                figure(one.over_update),
                figure(one.cosine, 5),
                figure(one.c),
                figure(one.z),
                figure(one.seen),
                figure(one.core),
            ],
        )
        return f"{aligned(rows)}\n{layers}"


def lines_of(base: RebasedBase) -> str:
    """A base with the digest of its first file."""
    first = next(iter(base.sha256.values()), "")
    more = f" and {len(base.sha256) - 1} more files" if len(base.sha256) > 1 else ""
    return f"{printable(base.name)} (SHA-256 {first[:16]}…{more})"
