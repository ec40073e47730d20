"""What a merge that streams to the Hub did."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.merge import AdapterEffect, effect_line
from loratool.results.text import aligned, size


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
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    digests: dict[str, str]  # output file → SHA-256
    dry_run: bool

    def __str__(self) -> str:
        return stream_text(self)


def stream_text(report: StreamReport) -> str:
    """What a streaming merge did."""
    rows: list[tuple[str, object]] = [
        ("would be merged into" if report.dry_run else "merged into", printable(report.repo)),
        ("tensors", f"{report.edited} edited, {report.copied} copied"),
        *(("adapter", effect_line(effect)) for effect in report.adapters),
        ("weights", f"{size(report.bytes_written)} in {report.files} files, {report.cost.seconds:.2f} s"),
        ("on this disk", f"at most {size(report.most_on_disk)} of weights at a time"),
        ("device", report.cost.device),
    ]
    if report.resumed:
        rows.append(("continued", f"{len(report.resumed)} files were already uploaded"))
    rows += [("left out", printable(line)) for line in report.left_out]
    rows += [("note", note) for note in report.notes]
    if not report.dry_run:
        rows.append(("see", printable(report.url)))
    return aligned(rows)
