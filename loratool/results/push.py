"""What `push` did."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import MOST_LINES, aligned, size


@dataclass(frozen=True, repr=False)
class PushReport(Result):
    """What a push did. Sizes are bytes, times seconds."""

    repo: str
    kind: str  # model or adapter
    url: str  # of the commit, or of the repository where nothing was sent
    commit: str
    pull_request: str
    private: bool
    files: dict[str, int]  # all that is to be there → size
    uploaded: tuple[str, ...]
    replaced: tuple[str, ...]  # weights of an earlier model that were deleted in the same commit
    left_out: tuple[str, ...]
    notes: tuple[Note, ...]
    dry_run: bool

    def __str__(self) -> str:
        return push_text(self)


def push_text(report: PushReport) -> str:
    """What a push did, or would do."""
    total = sum(report.files.values())
    rows: list[tuple[str, object]] = [
        ("would be pushed to" if report.dry_run else "pushed to", printable(report.repo)),
        ("what", f"{report.kind}, {len(report.files)} files, {size(total)}"),
    ]
    shown = list(report.files.items())
    if not report.dry_run:
        sent = sum(report.files[name] for name in report.uploaded)
        rows.append(
            (
                "sent",
                f"{len(report.uploaded)} files, {size(sent)}"
                if report.uploaded
                else "nothing; all files were already there",
            )
        )
        shown = [(name, report.files[name]) for name in report.uploaded]
    rows += [("file", f"{printable(name)}: {size(count)}") for name, count in shown[:MOST_LINES]]
    if len(shown) > MOST_LINES:
        rows.append(("", f"… and {len(shown) - MOST_LINES} more"))
    rows += [("replaced", printable(name)) for name in report.replaced]
    rows += [("left out", printable(line)) for line in report.left_out]
    rows += [("note", note) for note in report.notes]
    if not report.dry_run:
        rows.append(("see", printable(report.pull_request or report.url)))
    return aligned(rows)
