"""A GGUF file that is written tensor by tensor: its data wait in a file without a name until the header is known."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.files.gguf import MAGIC, GgufFile, GgufLayout
from loratool.files.safefile import LocalSource, copy_range, write_fully
from loratool.files.system import closing, open_file, sync_file
from loratool.files.tensor_writer import TensorFile
from loratool.layouts.ggml import STRING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

ALIGNMENT, VERSION, FLOAT32, UINT32 = 32, 3, 6, 4


def entry(key: str, value: str | float) -> bytes:
    """One value of the metadata: a text, a whole number of 32 bits, or a float32."""
    raw = key.encode()
    start = struct.pack("<Q", len(raw)) + raw
    if isinstance(value, str):
        text = value.encode()
        return start + struct.pack("<IQ", STRING, len(text)) + text
    return start + (struct.pack("<II", UINT32, value) if isinstance(value, int) else struct.pack("<If", FLOAT32, value))


def new_layout(values: Mapping[str, str | float]) -> GgufLayout:
    """The layout of a file that has values and no tensors; `like` gives one with tensors."""
    head = MAGIC + struct.pack("<IQQ", VERSION, 0, len(values)) + b"".join(entry(*each) for each in values.items())
    return GgufLayout(head, {}, None, {}, len(head), ALIGNMENT, 0)


def with_values(layout: GgufLayout, values: Mapping[str, str | float]) -> GgufLayout:
    """The layout of the same tensors with some values of the metadata, which are there or are added; the rest stays."""
    kept = [
        entry(key, values[key]) if key in values else layout.header[start:stop]
        for key, (start, stop) in layout.places.items()
    ]
    added = [entry(key, value) for key, value in values.items() if key not in layout.places]
    head = layout.header[:16] + struct.pack("<Q", len(kept) + len(added)) + b"".join(kept + added)
    plain = GgufLayout(head, {}, None, layout.values, len(head), layout.alignment, 0)
    return plain.like((info.name, info.dtype, info.shape) for info in layout.in_order)


def copy_with_values(source: GgufFile, path: Path, values: Mapping[str, str | float]) -> None:
    """A file like `source`, to the byte, but for some values of its metadata."""
    assert isinstance(source.layout, GgufLayout)
    layout = with_values(source.layout, values)
    with closing(open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)) as output, source.open() as reading:
        write_fully(output, layout.header, 0)
        copy_range(reading, source.layout.data_start, source.layout.stop, output, layout.data_start)
        sync_file(output)


@dataclass
class GgufTensorFile(TensorFile):
    """A file under way; `descriptor` is that of the data."""

    output: int = -1  # descriptor of the file itself
    values: Callable[[Mapping[str, str]], Mapping[str, str | float]] = dict  # of the metadata that were given
    order: Callable[[str, int], list[int] | None] = field(default=lambda name, rows: None)  # noqa: ARG005
    alignment = ALIGNMENT

    def add(self, name: str, dtype: str, shape: tuple[int, ...], content: memoryview | bytes) -> None:
        """Append a tensor's bytes, its rows in the order in which they are stored."""
        if shape and (order := self.order(name, shape[0])) is not None:
            width = len(content) // shape[0]
            content = b"".join(content[row * width : (row + 1) * width] for row in order)
        super().add(name, dtype, shape, content)

    def finish(self) -> None:
        layout = new_layout(self.values(self.metadata)).like(self.written)
        os.truncate(self.descriptor, self.at)  # with the padding of the last one
        write_fully(self.output, layout.header, 0)
        LocalSource(self.path, self.descriptor).copy_to(self.output, 0, self.at, len(layout.header))
        sync_file(self.output)


@contextmanager
def gguf_tensor_file(
    path: Path,
    metadata: Mapping[str, str],
    values: Callable[[Mapping[str, str]], Mapping[str, str | float]],
    order: Callable[[str, int], list[int] | None],
) -> Iterator[GgufTensorFile]:
    """A file to append to, until it is finished.

    Args:
        path: of the file.
        metadata: texts, to which more may be added before the end.
        values: what becomes of them in the file.
        order: for a tensor by its name and the number of its rows, which row comes at each place; None for as it is.
    """
    with (
        closing(open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)) as output,
        tempfile.TemporaryFile(dir=path.parent) as data,
    ):
        yield GgufTensorFile(path, data.fileno(), 0, dict(metadata), output=output, values=values, order=order)
