"""What a file is that begins as no file of weights does."""

from __future__ import annotations

FOREIGN_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to; run `git lfs pull`"),
    (b"<!doctype", "an HTML page, probably an error page saved by a download; download the file again"),
    (b"<html", "an HTML page, probably an error page saved by a download; download the file again"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"GGUF", "a GGUF file under the wrong name; rename it to end in .gguf"),
    (b"PK\x03\x04", "a zip archive, probably a torch checkpoint under the wrong name; loratool never unpickles it"),
    (b"\x80\x02", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x03", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x04", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x05", "a Python pickle; loratool never unpickles it"),
)


def foreign_start(head: bytes) -> str:
    """What a file is that begins as no file of weights does; empty where that is not known."""
    return next(
        (what for start, what in FOREIGN_STARTS if head.startswith(start) or head.lstrip().lower().startswith(start)),
        "",
    )


def is_text(head: bytes) -> bool:
    """Whether a file begins with ASCII text, which no length of a header does: it has zeros."""
    return bool(head) and head.isascii() and all(byte >= 32 or byte in b"\t\n\r" for byte in head)
