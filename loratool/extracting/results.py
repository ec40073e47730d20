"""What `extract()` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.results import Written

if TYPE_CHECKING:
    from loratool.notes import Note


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer. Errors are relative: ‖M − ΔW‖ / ‖M‖, Frobenius, with M = W_tuned − W_base."""

    rank: int
    norm: float  # ‖M‖
    relative: float  # ‖M‖ / ‖W_base‖
    predicted: float  # error of the rank, from ‖M‖² and the singular values
    achieved: float  # error of what is stored, rounding included
    above_noise: int  # of the singular values that were looked for, those larger than rounding can make


@dataclass(frozen=True)
class ExtractedTotals:
    """All layers together, those left out as noise among them; norms add up as squares."""

    norm: float
    predicted: float
    achieved: float
    parameters: int
    bytes: int  # of factors


@dataclass(frozen=True)
class ExtractReport(Written):
    """What `extract` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    rule: str
    totals: ExtractedTotals
    modules: Mapping[str, ExtractedLayer]  # by target
    noise: Mapping[str, ExtractedLayer]  # targets left out, since rounding alone explains what differs
    identical: int  # tensors
    excluded: int  # tensors that differ and were not asked for
    saved: tuple[str, ...]  # tensors that are saved whole
    left_out: Mapping[str, str]  # tensor that differs → why nothing of it is in the adapter
    dtype: str
    device: str
    seconds: float
    startup_seconds: float  # of `seconds`: until torch and the device were ready
    peak_memory: int
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        from loratool.report.extract import extract_text

        return self.with_push(extract_text(self))
