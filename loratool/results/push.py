"""What `push` did."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import MOST_LINES, aligned, plural
from loratool.shown import size


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
        """What a push did, or would do."""
        total = sum(self.files.values())
        rows: list[tuple[str, object]] = [
            ("would be pushed to" if self.dry_run else "pushed to", printable(self.repo)),
            ("what", f"{self.kind}, {plural(len(self.files), 'file')}, {size(total)}"),
        ]
        shown = list(self.files.items())
        if not self.dry_run:
            sent = sum(self.files[name] for name in self.uploaded)
            rows.append(
                (
                    "sent",
                    f"{plural(len(self.uploaded), 'file')}, {size(sent)}"
                    if self.uploaded
                    else "nothing; all files were already there",
                )
            )
            shown = [(name, self.files[name]) for name in self.uploaded]
        rows += [("file", f"{printable(name)}: {size(count)}") for name, count in shown[:MOST_LINES]]
        if len(shown) > MOST_LINES:
            rows.append(("", f"… and {len(shown) - MOST_LINES} more"))
        rows += [("replaced", printable(name)) for name in self.replaced]
        rows += [("left out", printable(line)) for line in self.left_out]
        rows += [("note", note) for note in self.notes]
        if not self.dry_run:
            rows.append(("see", printable(self.pull_request or self.url)))
        return aligned(rows)
