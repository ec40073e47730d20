"""What `merge` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.profile import Profile
from loratool.results.text import aligned, memory, plural, row_if
from loratool.shown import size

MOST_WORST = 3  # tensors that are named


@dataclass(frozen=True)
class AdapterEffect:
    """What an adapter did to the base. A module is a weight or a bias that it updates."""

    name: str
    weight: float
    modules: int
    unchanged: tuple[str, ...]  # those of its modules in which it changes no element by itself, after rounding

    @property
    def dead(self) -> bool:
        """Whether it changes nothing at all."""
        return len(self.unchanged) == self.modules > 0


@dataclass(frozen=True, repr=False)
class MergeReport(Written):
    """What a merge did. Sizes are bytes, times seconds, norms Frobenius."""

    out: Path
    edited: int  # tensors
    adapters: tuple[AdapterEffect, ...]
    copied: int  # tensors carried over byte for byte
    converted: int  # tensors that only changed dtype
    bytes_read: int
    bytes_written: int
    workers: int
    gpu_memory: int = 0
    resumed: tuple[str, ...] = ()  # output files that an earlier, interrupted run had finished
    relative_norms: dict[str, float] = field(default_factory=dict)  # tensor → ‖ΔW‖/‖W‖, where nothing replaces W
    gain: float | None = None  # the part of all updates that rounding leaves: ⟨W' − W, ΔW⟩ / ‖ΔW‖², on sampled rows
    gains: dict[str, float] = field(default_factory=dict)  # the same of each module, where nothing replaces W
    error_added: float | None = None  # ‖W' − (W + ΔW)‖ / ‖ΔW‖ of all weights that were requantised; None where none was
    errors_added: dict[str, float] = field(default_factory=dict)  # the same of each of their tensors
    nonfinite: dict[str, int] = field(default_factory=dict)  # edited tensor → NaN and inf that the base itself holds
    left_out: tuple[str, ...] = ()  # files of the base that are no part of the output
    notes: tuple[Note, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)  # weight file → root of its digests
    profile: Profile = field(default=Profile({}), compare=False)  # where the time went
    verified: int = 0  # files that were read again and compared with their digests

    def text(self) -> str:
        """What a merge did, for people."""
        rate = self.bytes_written / max(self.cost.seconds, 1e-9)
        norms = sorted(self.relative_norms.items(), key=lambda item: item[1])
        ends = [("largest ‖ΔW‖/‖W‖", norms[-1]), ("smallest ‖ΔW‖/‖W‖", norms[0])] if norms else []
        total = sum(self.nonfinite.values())
        return aligned(
            [
                ("merged into", printable(self.out)),
                (
                    "tensors",
                    f"{self.edited} edited, {self.copied} copied"
                    + (f", {self.converted} converted" if self.converted else ""),
                ),
                *(("adapter", effect_line(effect)) for effect in self.adapters),
                ("written", f"{size(self.bytes_written)} in {self.cost.seconds:.2f} s ({size(rate)}/s)"),
                (
                    "device",
                    f"{self.cost.device}, {plural(self.workers, 'worker')}, start-up {self.cost.startup_seconds:.2f} s",
                ),
                (
                    "peak memory",
                    memory(self.cost.peak_memory) + (f", GPU {size(self.gpu_memory)}" if self.gpu_memory else ""),
                ),
                *row_if(self.verified, "verified", f"{self.verified} files read again, each as it was written"),
                *row_if(
                    self.resumed, "continued", f"{len(self.resumed)} finished files of an interrupted run were kept"
                ),
                *((label, f"{ratio:.3g}  {printable(name)}") for label, (name, ratio) in ends),
                *([gain_row("gain", self.gain, self.gains)] if self.gain is not None else []),
                *(error_rows(self.error_added, self.errors_added) if self.error_added is not None else []),
                *row_if(
                    total, "NaN/inf in base", f"{total} values in {len(self.nonfinite)} edited tensors, kept unchanged"
                ),
                *(("left out", name) for name in self.left_out),
                *(("note", note) for note in self.notes),
            ]
        )


def gain_row(label: str, gain: float, gains: Mapping[str, float]) -> tuple[str, object]:
    """The part of an update that rounding leaves, in all and in the module with the least."""
    module, least = min(gains.items(), key=lambda item: item[1])
    return label, f"{gain:.3f} of the update after rounding; least {least:.3f}  {printable(module)}"


def error_rows(error: float, errors: Mapping[str, float]) -> list[tuple[str, object]]:
    """The error that requantising adds, in all and in the tensors with most of it."""
    worst = sorted(errors.items(), key=lambda item: -item[1])[:MOST_WORST]
    first = ("error added", f"{error:.3f} of ‖ΔW‖, in {len(errors)} requantised weights; most of all:")
    return [first, *(("", f"{value:.3f}  {printable(name)}") for name, value in worst)]


def effect_line(effect: AdapterEffect) -> str:
    """What an adapter did, in a line."""
    changed = effect.modules - len(effect.unchanged)
    some = f"{changed} of " if effect.unchanged else ""
    return f"{effect.name}: {some}{plural(effect.modules, 'module')} changed, weight {effect.weight:g}"
