"""A file of weights, in whichever format it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratool.files.safefile import PREFIX, SafeFile, header_length, read_safefile

if TYPE_CHECKING:
    from loratool.files.small_tensors import ReadRange


def read_weight_file(path: Path) -> SafeFile:
    """The header of a safetensors or a GGUF file, as its name tells; no tensor data is touched.

    Raises `InputError` where the file breaks a rule of its format.
    """
    if path.suffix == ".gguf":
        from loratool.files.gguf import read_gguf  # with tables that no other file needs

        return read_gguf(path)
    return read_safefile(path)


def distant_header(path: Path, size: int, read: ReadRange, first: int) -> bytes:
    """The header of a weight file of `size` bytes that is elsewhere, in the format that its name tells.

    The first request is for `first` bytes, which few headers exceed. Raises as `read_weight_file` does.
    """
    if path.suffix == ".gguf":
        from loratool.files.gguf import gguf_layout

        return gguf_layout(path, size, read).header
    head = read(0, min(first, size))
    length = PREFIX + header_length(path, head, size)
    return (head + read(len(head), length - len(head)) if length > len(head) else head)[:length]
