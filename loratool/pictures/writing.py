"""Pages and figures as files: what they may replace, and how they come to be there whole."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from loratool.arguments import PathLike
from loratool.errors import StorageError, UsageError, printable
from loratool.files.names import check_separators
from loratool.files.outputs import check_file, check_local, write_file
from loratool.files.system import shell_word
from loratool.pictures.drawing import METADATA_START, svg_file
from loratool.pictures.page import figures_of, html_page
from loratool.results.base import Result

LARGEST_HEAD = 1 << 16  # bytes in which a page's title ends
PAGE_TITLE = re.compile(rb"<title>[^<]*\xc2\xb7 loratool [a-z]+</title>")
SVG_START = re.compile(rb"<svg [^>]*>\n<metadata>" + METADATA_START.encode() + rb" [^<]*</metadata>")


def write_page(results: Result | Sequence[Result], path: PathLike, *, overwrite: bool = False) -> None:
    """Write the HTML page of a result, or of several, to a file.

    Args:
        results: what a function of loratool returned, such as a `MergeReport`, or several of them.
        path: the file, which appears when it is complete.
        overwrite: replace a page that loratool made. No other file is ever replaced.

    Raises:
        UsageError: there is a file that may not be replaced, or a result is of a kind that has no page.
        StorageError: a disk or file-system error.
    """
    path = Path(path)
    check_page(path, overwrite)
    write_file(path, html_page(results).encode(errors="backslashreplace"))


def write_svgs(results: Result | Sequence[Result], folder: PathLike, *, overwrite: bool = False) -> list[Path]:
    """Write the figures of a result, or of several, as SVG files, and return their paths.

    Args:
        results: as for `write_page`.
        folder: where the files go; it is made if there are any and it does not exist. Names begin with the command, as `merge-gain.svg`.
        overwrite: replace figures that loratool made. No other file is ever replaced.

    Raises:
        UsageError: there is a file that may not be replaced, or a result is of a kind that has no figures.
        StorageError: a disk or file-system error.
    """
    folder = Path(folder)
    figures = {folder / f"{name}.svg": figure for name, figure in figures_of(results).items()}
    check_folder(folder)
    for path in figures:
        check_file(path, "--svg", is_figure, overwrite)
    if figures:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{printable(folder)}: {error.strerror or error}") from None
    for path, figure in figures.items():
        write_file(path, svg_file(figure).encode(errors="backslashreplace"))
    return [*figures]


def check_page(path: Path, overwrite: bool) -> None:
    """Raise `UsageError` where a page may not be written to `path`; nothing but pages made here is replaced."""
    check_local(path, "--html")
    if path.suffix in (".pdf", ".svg", ".png"):
        name = path.with_suffix(".html")
        raise UsageError(
            f"--html {printable(path)}: pages are HTML; print one from a browser for a PDF, and pass --svg DIR for figures",
            hint=f"--html {shell_word(os.fspath(name))}",
        )
    check_file(path, "--html", is_page, overwrite)
    if not path.parent.is_dir():
        raise UsageError(f"--html {printable(path)}: the folder {printable(path.parent)} does not exist")


def check_svgs(folder: Path, command: str, overwrite: bool) -> None:
    """Raise `UsageError` where the figures of a command may not be written to a folder.

    Before the work it is not known which figures there will be, so every name that one of them may have is looked at.
    """
    check_folder(folder)
    if folder.is_dir():
        for path in sorted(folder.glob(f"{command}-*.svg")):
            check_file(path, "--svg", is_figure, overwrite)


def check_folder(folder: Path) -> None:
    """Raise `UsageError` where there is no folder, and none can be made."""
    check_local(folder, "--svg")
    if folder.suffix == ".svg" and not folder.is_dir():
        raise UsageError(
            f"--svg {printable(folder)}: expected a folder, in which each figure gets a file of its own",
            hint=f"--svg {shell_word(os.fspath(folder.with_suffix('')))}",
        )
    check_separators(folder, "--svg")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"--svg {printable(folder)}: is not a folder")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"--svg {printable(folder)}: the folder {printable(folder.parent)} does not exist")


def is_page(path: Path) -> bool:
    """Whether a file is a page made here, of this release or another."""
    start = head(path)
    return start.startswith(b"<!doctype html>") and PAGE_TITLE.search(start) is not None


def is_figure(path: Path) -> bool:
    """Whether a file is a figure made here, of this release or another."""
    return SVG_START.match(head(path)) is not None


def head(path: Path) -> bytes:
    """The beginning of a file; nothing of what is not a regular one."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(LARGEST_HEAD)
