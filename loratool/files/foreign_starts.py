"""What a file is that begins as no file of weights does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.errors import printable
from loratool.files.system import shell_word

if TYPE_CHECKING:
    from pathlib import Path

FOREIGN_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to; run `git lfs pull`"),
    (b"<!doctype", "an HTML page, probably an error page saved by a download; download the file again"),
    (b"<html", "an HTML page, probably an error page saved by a download; download the file again"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"GGUF", "a GGUF file under the wrong name; rename it to end in .gguf"),
    (
        b"PK\x03\x04",
        "a zip archive; unpack it, unless it is a torch checkpoint under the wrong name, which loratool never unpickles",
    ),
    (b"\x80\x02", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x03", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x04", "a Python pickle; loratool never unpickles it"),
    (b"\x80\x05", "a Python pickle; loratool never unpickles it"),
)

UNPACKING = {  # the ends of archives' names → the command that unpacks one into a folder
    ".zip": "unzip {0} -d {1}",
    **dict.fromkeys((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst"), "mkdir -p {1} && tar -xf {0} -C {1}"),
    ".7z": "7z x {0} -o{1}",
    ".rar": "unrar x {0} {1}/",
}


def archive(path: Path) -> str:
    """What a file is that is called as an archive, and the command that unpacks it; empty for any other."""
    command = UNPACKING.get(path.suffix.lower(), "")
    if not command or not path.is_file():
        return ""
    folder = path.with_name(path.name.partition(".")[0] or "unpacked")
    words = (shell_word(printable(name)) for name in (path, folder))
    return f"an archive; unpack it with: {command.format(*words)}; then pass the folder"


def foreign_start(head: bytes) -> str:
    """What a file is that begins as no file of weights does; empty where that is not known."""
    return next(
        (what for start, what in FOREIGN_STARTS if head.startswith(start) or head.lstrip().lower().startswith(start)),
        "",
    )


def is_text(head: bytes) -> bool:
    """Whether a file begins with ASCII text, which no length of a header does: it has zeros."""
    return bool(head) and head.isascii() and all(byte >= 32 or byte in b"\t\n\r" for byte in head)
