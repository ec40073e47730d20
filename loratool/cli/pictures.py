"""`--html` and `--svg`: the page of a result and its figures, checked before the work and written after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.errors import UsageError, printable

if TYPE_CHECKING:
    from loratool.results.base import Result


@dataclass(frozen=True)
class Pictures:
    """Where a command is to write its page and its figures; nowhere where that is not asked for."""

    html: Path | None
    svg: Path | None
    overwrite: bool
    command: str

    def __bool__(self) -> bool:
        return self.html is not None or self.svg is not None

    def check(self, out: Path | None) -> None:
        """Raise `UsageError` where they could not be written, and where they would be in the way of an output."""
        if not self:  # the modules of pictures are not imported then
            return
        from loratool.pictures.writing import check_page, check_svgs

        if self.html is not None:
            apart("--html", self.html, out)
            check_page(self.html, self.overwrite)
        if self.svg is not None:
            apart("--svg", self.svg, out)
            check_svgs(self.svg, self.command, self.overwrite)

    def write(self, results: Result | Sequence[Result]) -> None:
        """Write what is asked for."""
        if not self:
            return
        from loratool.pictures.writing import write_page, write_svgs

        if self.html is not None:
            write_page(results, self.html, overwrite=self.overwrite)
        if self.svg is not None and not write_svgs(results, self.svg, overwrite=self.overwrite):
            sentence = "nothing was written, because there are no figures for this"
            click.echo(f"note: --svg {printable(self.svg)}: {sentence}", err=True)


def apart(flag: str, path: Path, out: Path | None) -> None:
    """Raise `UsageError` where a picture would be a part of the output, which has nothing but its own files."""
    if out is None:
        return
    real, folder = os.path.realpath(path), os.path.realpath(out)
    if real == folder or real.startswith(os.path.join(folder, "")):
        raise UsageError(
            f"{flag} {printable(path)} is inside OUT, the folder {printable(out)}; choose a path outside it"
        )
