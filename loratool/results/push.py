"""What `push` did."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Result
from loratool.results.text import MOST_LINES, aligned, plural, row_if
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
        names = list(self.files if self.dry_run else self.uploaded)
        sent = f"{plural(len(names), 'file')}, {size(sum(self.files[name] for name in names))}"
        return aligned(
            [
                ("would be pushed to" if self.dry_run else "pushed to", printable(self.repo)),
                ("what", f"{self.kind}, {plural(len(self.files), 'file')}, {size(sum(self.files.values()))}"),
                *row_if(not self.dry_run, "sent", sent if names else "nothing; all files were already there"),
                *(("file", f"{printable(name)}: {size(self.files[name])}") for name in names[:MOST_LINES]),
                *row_if(len(names) > MOST_LINES, "", f"… and {len(names) - MOST_LINES} more"),
                *(("replaced", printable(name)) for name in self.replaced),
                *(("left out", printable(line)) for line in self.left_out),
                *(("note", note) for note in self.notes),
                *row_if(not self.dry_run, "see", printable(self.pull_request or self.url)),
            ]
        )
