"""GGUF files byte by byte, as the format's description has them: for readers of headers, and without llama.cpp's package."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, code: int, value: bytes) -> bytes:
    """One value of the metadata."""
    return text(key) + struct.pack("<I", code) + value


def words(key: str, value: str) -> bytes:
    return entry(key, STRING, text(value))


def number(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def tensor(name: str, shape: tuple[int, ...], code: int = 0, at: int = 0) -> bytes:
    """One tensor of the list."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, at)


def whole_file(entries: tuple[bytes, ...], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A model of float32 tensors."""
    listed, data = [], b""
    for name, values in tensors.items():
        listed.append(tensor(name, values.shape, at=len(data)))
        data += np.ascontiguousarray(values, np.float32).tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(entries)) + b"".join((*entries, *listed))
    return head + b"\0" * (-len(head) % ALIGNMENT) + data
