"""What went to the Hub, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.errors import printable
from loratool.report import MOST_LINES, aligned, effect_line, size

if TYPE_CHECKING:
    from loratool.hub.pushing import PushReport
    from loratool.hub.streaming import StreamReport


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
            ("sent", f"{len(report.uploaded)} files, {size(sent)}" if report.uploaded else "nothing was missing")
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


def stream_text(report: StreamReport) -> str:
    """What a streaming merge did."""
    rows: list[tuple[str, object]] = [
        ("would be merged into" if report.dry_run else "merged into", printable(report.repo)),
        ("tensors", f"{report.edited} edited, {report.copied} copied"),
        *(("adapter", effect_line(effect)) for effect in report.adapters),
        ("weights", f"{size(report.bytes_written)} in {report.files} files, {report.seconds:.2f} s"),
        ("on this disk", f"at most {size(report.most_on_disk)} of weights at a time"),
        ("device", report.device),
    ]
    if report.resumed:
        rows.append(("continued", f"{len(report.resumed)} files were there already"))
    rows += [("left out", printable(line)) for line in report.left_out]
    rows += [("note", note) for note in report.notes]
    if not report.dry_run:
        rows.append(("see", printable(report.url)))
    return aligned(rows)
