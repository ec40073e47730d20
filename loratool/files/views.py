"""Files that are read as one, and tensors of a file that are read under other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.files.safefile import Layout, SafeFile, TensorInfo
from loratool.files.source import Source


@dataclass(frozen=True)
class SafeFiles(SafeFile):
    """Several files that are read as one. `path` is that of their index, `layout` that of one file with all tensors."""

    is_own: ClassVar[bool] = False

    parts: tuple[SafeFile, ...]

    @classmethod
    def of(cls, path: Path, parts: Iterable[SafeFile]) -> SafeFiles:
        """These files, no two of which hold tensors of the same name."""
        every = tuple(parts)
        tensors = [(info.name, info.dtype, info.shape) for part in every for info in part.tensors.values()]
        return cls(path, Layout.of(tensors), every[0].identity, every)

    @property
    def files(self) -> tuple[SafeFile, ...]:
        return self.parts

    def home(self, name: str) -> SafeFile:
        return next(part for part in self.parts if name in part.tensors)

    def check_unchanged(self, source: Source | None = None) -> None:  # noqa: ARG002 (of none of them)
        for part in self.parts:
            part.check_unchanged()


@dataclass(frozen=True)
class Selection(SafeFile):
    """Some tensors of a file under other names; `layout` is that of a file with them alone, in the same order."""

    is_own: ClassVar[bool] = False

    original: SafeFile
    names: Mapping[str, str]  # name here → name in the original

    @classmethod
    def of(cls, original: SafeFile, names: Mapping[str, str]) -> Selection:
        """The tensors of `original` that `names` has, name here → name there."""
        ordered = sorted(names, key=lambda name: original.tensors[names[name]].start)
        infos = {name: original.tensors[names[name]] for name in ordered}
        layout = Layout.of(((n, i.dtype, i.shape) for n, i in infos.items()), original.layout.metadata)
        return cls(original.path, layout, original.identity, original, names)

    @contextmanager
    def open(self) -> Iterator[Source]:
        with self.original.open() as source:
            yield source

    def check_unchanged(self, source: Source | None = None) -> None:
        self.original.check_unchanged(source)

    def position(self, tensor: TensorInfo) -> int:
        return self.original.position(self.original.tensors[self.names[tensor.name]])
