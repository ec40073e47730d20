"""The head of a safetensors file as far as it takes to recognise it: names and metadata, with nothing checked.

Reading a header with all its checks takes some microseconds for each tensor; names alone take a tenth of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from loratool.files.safefile import MOST_TENSORS, PREFIX, read_header
from loratool.files.weight_formats import read_weight_file

KEY = b'"__metadata__"'
METADATA = b"{" + KEY + b":"  # as the reference writes it, before all tensors
# What stands between quotation marks in the entry of a tensor as the reference writes it, and where.
WRITTEN = {2: b":{", 3: b"dtype", 4: b":", 6: b",", 7: b"shape", 9: b"data_offsets"}
MARKS = 10  # quotation marks of an entry
ENTRY = re.compile(rb'[{,]\s*"([^"]*)"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)"')
OFFSETS = b'"data_offsets"'  # one for each tensor
DIGITS = b"0123456789"


class HasNames(Protocol):
    """What a file is recognised by."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def tensors(self) -> Mapping[str, object]:
        """Its tensors by name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its header holds besides."""


@dataclass(frozen=True)
class Head:
    """Names and metadata of one file."""

    path: Path
    tensors: Mapping[str, object]  # by name; there is nothing to know of them
    metadata: Mapping[str, str]

    @cached_property
    def kinds(self) -> Mapping[str, str]:
        """Names without their digits, each with the last name that is so without them; a file has few."""
        return without_digits(self.tensors)


def kinds_of(file: HasNames) -> Mapping[str, str]:
    """Names of a file without their digits, each with the last name that is so without them."""
    return file.kinds if isinstance(file, Head) else without_digits(file.tensors)


def without_digits(names: Mapping[str, object]) -> dict[str, str]:
    joined = "\n".join(names).encode("utf-8", "surrogatepass").translate(None, DIGITS)
    kinds = joined.decode("utf-8", "surrogatepass").split("\n")
    return dict(zip(kinds, names, strict=True)) if len(kinds) == len(names) else {name: name for name in names}


def read_head(path: Path) -> Head:
    """The head of a file. Raises `InputError` where it has none; one with an odd header is read with all checks."""
    if path.suffix != ".gguf" and (found := quickly(path, read_header(path)[0][PREFIX:])) is not None:
        return found
    file = read_weight_file(path)
    return Head(path, file.tensors, file.metadata)


def quickly(path: Path, raw: bytes) -> Head | None:
    """The head of a file whose header is as most are; None for any other."""
    metadata: Any = {}
    at = 0
    if raw.startswith(METADATA):
        try:
            text = raw.decode()
            metadata, end = json.JSONDecoder().raw_decode(text, len(METADATA))
        except (ValueError, RecursionError):
            return None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            return None
        at = end if len(text) == len(raw) else len(text[:end].encode())
    rest = raw[at:] if at else raw
    count = rest.count(OFFSETS)
    if b"\\" in rest or KEY in rest or count > MOST_TENSORS:
        return None
    parts = rest.split(b'"')
    if len(parts) == MARKS * count + 1 and all({*parts[place::MARKS]} == {text} for place, text in WRITTEN.items()):
        names = parts[1::MARKS]
    else:
        names = ENTRY.findall(rest)
    try:
        return Head(path, dict.fromkeys(map(bytes.decode, names)), metadata) if len(names) == count else None
    except UnicodeDecodeError:
        return None
