"""The digests of a weight file by their definition (docs/provenance.md), on the bytes of a whole file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from blake3 import blake3

CHUNK = 64 * 1024 * 1024
BITS = {"U8": 8, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "F64": 64, "F8_E4M3": 8, "F4": 4}


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def blake(content: bytes) -> bytes:
    return blake3(content).digest()


def entry_of(content: bytes, chunk: int = CHUNK, digest: Callable[[bytes], bytes] = blake) -> dict[str, Any]:
    """The entry of a weight file with this content in `loratool.json`."""
    begin = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:begin])
    table.pop("__metadata__", None)
    tensors = {}
    for name, info in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        data = content[begin + start : begin + stop]
        rows, bits = (info["shape"] or [1])[0], math.prod(info["shape"][1:]) * BITS[info["dtype"]]
        if not data or bits % 8:
            pieces = [data]
        else:
            together = max(1, chunk // (bits // 8))  # rows of a chunk
            pieces = [data[at * bits // 8 : (at + together) * bits // 8] for at in range(0, rows, together)]
        assert b"".join(pieces) == data
        tensors[name] = [digest(piece) for piece in pieces]
    roots = b"".join(digest(b"".join(chunks)) for chunks in tensors.values())
    return {
        "size": len(content),
        "function": "blake3" if digest is blake else digest.__name__,
        "root": digest(digest(content[:begin]) + roots).hex(),
        "header": digest(content[:begin]).hex(),
        "tensors": {name: [each.hex() for each in chunks] for name, chunks in tensors.items()},
    }


def root_of(content: bytes) -> str:
    return str(entry_of(content)["root"])


def file_entry(name: str, content: bytes, sha256: bool = False) -> dict[str, Any]:
    """The entry of any file of an output; `sha256` is that of a run with `--sha256`, or of one that streams."""
    plain = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if not name.endswith(".safetensors") or name.startswith("adapter_"):
        return plain
    return {**entry_of(content), **(plain if sha256 else {})}
