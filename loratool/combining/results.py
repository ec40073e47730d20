"""What `combine()` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.results import Written

if TYPE_CHECKING:
    from loratool.comparing import Meeting
    from loratool.notes import Note


@dataclass(frozen=True)
class Part:
    """What became of one adapter in one layer."""

    weight: float
    norm: float  # ‖ΔW‖, weight not included
    energy_kept: float | None  # ‖U'U'ᵀ ΔW V'V'ᵀ‖² / ‖ΔW‖² with the singular vectors of the result
    norm_ratio: float | None  # ‖result‖ / ‖w ΔW‖


@dataclass(frozen=True)
class CombinedLayer:
    """One layer of the result. Errors are relative to what the method gives at full rank, Frobenius."""

    rank: int
    norm: float
    whole: float  # ‖what the method gives at full rank‖
    truncated: float  # error of the cut to `rank`
    stored: float  # error of rounding to the stored dtype, relative to the cut result
    error: float  # both together
    parts: Mapping[str, Part]  # by adapter
    meetings: Mapping[str, Meeting]  # "one × other"
    cancels: str = ""  # "zero" or "unscaled": what became of a sum that is no more than the rounding of its factors


@dataclass(frozen=True)
class CombinedTotals:
    """All layers together; norms add up as squares."""

    norm: float
    truncated: float
    stored: float
    error: float
    energy_kept: Mapping[str, float | None]  # by adapter
    norm_ratio: Mapping[str, float | None]
    cosine: Mapping[str, float | None]  # "one × other"
    parameters: int
    bytes: int  # of factors


@dataclass(frozen=True)
class CombineReport(Written):
    """What `combine` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    method: str
    settings: Mapping[str, Any]
    adapters: tuple[str, ...]
    totals: CombinedTotals
    modules: Mapping[str, CombinedLayer]  # by target
    dtype: str
    device: str
    seconds: float
    startup_seconds: float
    peak_memory: int
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        from loratool.report.algebra import combine_text

        return self.with_push(combine_text(self))
