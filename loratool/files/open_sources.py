"""Input files that stay open while an output is made of them."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from loratool.files.safefile import SafeFile
    from loratool.files.seen_digests import SeenDigests
    from loratool.files.source import Source


class OpenSources:
    """Files that stay open for reading, each opened once, whichever thread asks for it first."""

    def __init__(self, seen: SeenDigests | None = None) -> None:
        """`seen` is told what is read."""
        self.seen = seen
        self.lock = threading.Lock()
        self.stack = ExitStack()
        self.opened: dict[Path, tuple[SafeFile, Source]] = {}

    def of(self, file: SafeFile) -> Source:
        """The bytes of a file. Raises `InputError` where it is no longer the file whose header was read."""
        with self.lock:
            if file.path not in self.opened:
                self.opened[file.path] = file, self.stack.enter_context(file.open())
            return self.opened[file.path][1]

    def read(self, file: SafeFile, at: int, into: memoryview) -> None:
        """Fill `into` with bytes of a file, from byte `at` on."""
        self.of(file).read(at, len(into), into)
        if self.seen is not None:
            self.seen.saw(file, at, into)

    def check_unchanged(self) -> None:
        """Raise `InputError` when a file was changed or cut while it was open."""
        with self.lock:
            opened = list(self.opened.values())  # another thread may open one meanwhile
        for file, source in opened:
            file.check_unchanged(source)

    def __enter__(self) -> OpenSources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all of them."""
        self.stack.close()
