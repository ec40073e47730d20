"""A safetensors file that is written tensor by tensor, its header last."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.files.digests import digest_of_range
from loratool.files.safefile import Layout, LocalSource, SafeFile, TensorInfo, copy_range, write_fully
from loratool.files.system import closing, open_file, sync_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

Triple = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
OF_DATA = "0" * 64  # among the metadata: stands for the SHA-256 of all tensors' bytes
SLACK = 64  # bytes of metadata that may be added before the end


@dataclass
class TensorFile:
    """A file under way. Room for the header is kept from the beginning."""

    path: Path
    descriptor: int
    reserved: int  # bytes before the first tensor
    metadata: Mapping[str, str]
    written: list[Triple] = field(default_factory=list)
    at: int = 0
    alignment = 1  # of the first byte of each tensor

    def add(self, name: str, dtype: str, shape: tuple[int, ...], content: memoryview | bytes) -> None:
        """Append a tensor's bytes."""
        write_fully(self.descriptor, content, self.reserved + self.at)
        self.take(name, dtype, shape, len(content))

    def copy(self, name: str, source: SafeFile, info: TensorInfo) -> None:
        """Append a tensor of another file, byte for byte."""
        with source.open() as reading:
            copy_range(reading, source.position(info), info.nbytes, self.descriptor, self.reserved + self.at)
        self.take(name, info.dtype, info.shape, info.nbytes)

    def take(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        """Count a tensor as written; the next one comes behind it."""
        self.written.append((name, dtype, shape))
        self.at += -(-size // self.alignment) * self.alignment

    def finish(self) -> None:
        """Write the header and make the file durable."""
        metadata = {key: self.digest() if value == OF_DATA else value for key, value in self.metadata.items()}
        layout = Layout.of(self.written, metadata, self.reserved)
        assert layout.data_start == self.reserved, "tensors were announced smaller than they are"
        write_fully(self.descriptor, layout.header, 0)
        sync_file(self.descriptor)

    def digest(self) -> str:
        """SHA-256 of the bytes of all tensors, in their order."""
        return digest_of_range(
            LocalSource(self.path, self.descriptor), self.reserved, self.reserved + self.at, hashlib.sha256
        )


@contextmanager
def tensor_file(
    path: Path, announced: Iterable[Triple], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFile]:
    """A file to append to, until it is finished; `announced` are all tensors that may come, none smaller than it will be."""
    told = {"format": "pt", **(metadata or {})}
    reserved = room_for(Layout.of(announced, told)) + (SLACK if metadata else 0)
    with closing(open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)) as descriptor:
        yield TensorFile(path, descriptor, reserved, told)


def room_for(layout: Layout) -> int:
    """Bytes that are enough for the header of these tensors in whatever order they come."""
    most = len(str(layout.size))  # digits of the largest position
    digits = sum(2 * most - len(str(t.start)) - len(str(t.stop)) for t in layout.tensors.values())
    return layout.data_start + digits + -digits % 8
