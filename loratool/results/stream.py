"""What a merge that streams to the Hub did."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.merge import AdapterEffect, effect_line
from loratool.results.text import aligned, plural, row_if
from loratool.shown import size


@dataclass(frozen=True, repr=False)
class StreamReport(Result):
    """What a streaming merge did. Sizes are bytes, times seconds."""

    repo: str
    url: str
    commit: str
    private: bool
    edited: int  # tensors
    adapters: tuple[AdapterEffect, ...]  # of the files that this run merged
    copied: int  # tensors carried over byte for byte
    files: int  # of weights
    bytes_written: int
    resumed: tuple[str, ...]  # output files that were there already
    most_on_disk: int  # bytes of weight files that were on this disk at one time
    gain: float | None  # the part of all updates that rounding leaves: ⟨W' − W, ΔW⟩ / ‖ΔW‖², on sampled rows
    gains: dict[str, float]  # the same of each module
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    digests: dict[str, str]  # weight file → root of its digests
    dry_run: bool

    def __str__(self) -> str:
        """What a streaming merge did."""
        return aligned(
            [
                ("would be merged into" if self.dry_run else "merged into", printable(self.repo)),
                ("tensors", f"{self.edited} edited, {self.copied} copied"),
                *(("adapter", effect_line(effect)) for effect in self.adapters),
                ("weights", f"{size(self.bytes_written)} in {plural(self.files, 'file')}, {self.cost.seconds:.2f} s"),
                ("on this disk", f"at most {size(self.most_on_disk)} of weights at a time"),
                ("device", self.cost.device),
                *([("gain", f"{self.gain:.3f} of the update after rounding")] if self.gain is not None else []),
                *row_if(self.resumed, "continued", f"{len(self.resumed)} files were already uploaded"),
                *(("left out", printable(line)) for line in self.left_out),
                *(("note", note) for note in self.notes),
                *row_if(not self.dry_run, "see", printable(self.url)),
            ]
        )
