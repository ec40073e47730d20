"""One GGUF file: its header as a table of tensors and values, and the header of an output like it.

The rules are those of llama.cpp's `gguf.cpp`: versions 2 and 3, at most four dimensions, no array of arrays, no name
twice, tensors one after the other with nothing but padding between them. A header is read up to a bound, and nothing
in it is believed before it was compared with the size of the file. The `gguf` package maps whole files into memory and
makes objects of every token of a vocabulary, so that it reads none for us; its tables are those of `layouts/ggml`.

Tensors are named and shaped as numpy sees them, (rows, columns): a file lists dimensions the other way round.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.errors import InputError, printable
from loratool.files.foreign_starts import foreign_start
from loratool.files.safefile import (
    MOST_TENSORS,
    Identity,
    Layout,
    SafeFile,
    TensorInfo,
    read_exactly,
)
from loratool.files.stand_ins import told_identity
from loratool.files.system import closing
from loratool.files.untrusted import open_regular, reading
from loratool.layouts.ggml import ARRAY, BY_CODE, NUMBERS, STRING, TYPES
from loratool.layouts.gguf import ARCHITECTURES, SIZES

MAGIC = b"GGUF"
OLD = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggla")  # of the formats before it
VERSIONS = (2, 3)
LONGEST_HEADER = 100_000_000  # bytes, as for safetensors
MOST_VALUES = 100_000  # entries of the metadata
LONGEST_KEPT = 4096  # bytes of a string, and numbers of an array, that are kept to be looked at
LONGEST_NAME = 4096  # bytes
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 20
WINDOW = 1 << 18  # bytes that are read at first
LARGEST = 2**63 - 1
LENGTH = struct.Struct("<Q")
KEY_OF_TYPE, KEY_OF_ALIGNMENT = "general.type", "general.alignment"


@dataclass(frozen=True)
class Array:
    """An array of the metadata: what it is made of, how many there are, and the numbers where they are few."""

    code: int  # of an element
    count: int
    numbers: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} {'texts' if self.code == STRING else 'numbers'}"


Value = str | int | float | bool | Array


@dataclass(frozen=True)
class GgufLayout(Layout):
    """The head of a GGUF file, whether or not the file exists yet."""

    values: Mapping[str, Value]  # the metadata
    table: int  # byte at which the list of tensors begins
    alignment: int
    stop: int  # bytes of data, with the padding at their end
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # key → the bytes of its entry in the header

    @property
    def size(self) -> int:
        return self.data_start + self.stop

    @property
    def padding(self) -> int:
        return self.stop - sum(info.nbytes for info in self.tensors.values())

    def like(
        self, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> GgufLayout:
        """The layout of an output with the same metadata, to the byte, and these tensors in their order."""
        assert metadata is None, "values of a GGUF file are never edited"
        placed: dict[str, TensorInfo] = {}
        entries: list[bytes] = []
        at = 0
        for name, dtype, shape in tensors:
            stop = at + bytes_of(dtype, shape)
            placed[name] = TensorInfo(name, dtype, tuple(shape), at, stop)
            raw = name.encode()
            sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            entries.append(struct.pack("<Q", len(raw)) + raw + sizes + struct.pack("<IQ", TYPES[dtype].code, at))
            at = padded(stop, self.alignment)
        header = b"".join((self.header[:8], struct.pack("<Q", len(placed)), self.header[16 : self.table], *entries))
        header += b"\0" * (-len(header) % self.alignment)
        return GgufLayout(header, placed, None, self.values, self.table, self.alignment, at)


@dataclass(frozen=True)
class GgufFile(SafeFile):
    """A GGUF file whose header has been read and found valid."""

    @property
    def values(self) -> Mapping[str, Value]:
        """The metadata."""
        assert isinstance(self.layout, GgufLayout)
        return self.layout.values

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts among the values."""
        return {key: value for key, value in self.values.items() if isinstance(value, str)}

    def text(self, key: str) -> str:
        """A string of the metadata; empty where there is none of that name."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str, layer: int = 0) -> int:
        """A whole number of the metadata, or that of a layer where each has its own; 0 where there is none."""
        value = self.values.get(key)
        if isinstance(value, Array):
            value = value.numbers[layer] if layer < len(value.numbers) else 0
        return value if type(value) is int and value > 0 else 0

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What a config of transformers would say of the model, as far as the metadata tells."""
        kind = self.text("general.architecture")
        known = ARCHITECTURES.get(kind)
        sizes = {there: self.number(f"{kind}.{key}") for key, there in SIZES.items()}
        tied = (
            {"tie_word_embeddings": "output.weight" not in self.tensors} if "token_embd.weight" in self.tensors else {}
        )
        return {"model_type": known.model_type if known else kind, **{k: n for k, n in sizes.items() if n}, **tied}


def padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, whose rows are whole blocks."""
    packing = TYPES[dtype]
    return math.prod(shape) // packing.values * packing.nbytes


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of one GGUF file; no tensor data is touched.

    Raises `InputError` where the file breaks a rule of the format, or lists tensors that it does not hold.
    """
    with reading(path), closing(open_regular(path)) as descriptor:

        def read(start: int, count: int) -> bytes:
            buffer = bytearray(count)
            read_exactly(descriptor, memoryview(buffer), start, path)
            return bytes(buffer)

        identity = Identity.of(os.fstat(descriptor))
        layout = gguf_layout(path, identity.size, read)
    return GgufFile(path, layout, told_identity(path) or identity)


def gguf_layout(path: Path, size: int, read: Callable[[int, int], bytes]) -> GgufLayout:
    """The header of a file of so many bytes, of which `read` gives some: (first byte, how many). Raises as `read_gguf`."""
    return Reader(path, size, read).layout()


class Reader:
    """The bytes of a header, read as they are asked for and never beyond the bound."""

    def __init__(self, path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
        self.path, self.size, self.read = path, size, read
        self.raw, self.at = b"", 0
        self.places: dict[str, tuple[int, int]] = {}

    def refuse(self, what: str) -> InputError:
        return InputError(f"{printable(self.path)}: {what}")

    def need(self, count: int) -> int:
        """Where the next `count` bytes begin, once they are in memory; the position moves behind them."""
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            missing = f"{self.at - self.size} bytes of it are missing"
            raise self.refuse(f"the file is truncated inside its header: {missing}; copy or download it again")
        if self.at > LONGEST_HEADER:
            raise self.refuse(f"its header is over the limit of {LONGEST_HEADER} bytes")
        if self.at > len(self.raw):
            stop = min(self.size, LONGEST_HEADER, max(WINDOW, 2 * len(self.raw), self.at))
            self.raw += self.read(len(self.raw), stop - len(self.raw))
        return start

    def number(self, kind: str) -> Any:
        """One number of a kind that `struct` names."""
        start = self.need(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.raw, start)[0]

    def count(self, least: int, what: str) -> int:
        """How many of something follow, each of which takes `least` bytes and more."""
        count: int = self.number("Q")
        if count * least > min(self.size, LONGEST_HEADER) - self.at:
            raise self.refuse(f"claims {count} {what}, more than the rest of its header can hold")
        return count

    def name(self, what: str) -> str:
        length = self.count(1, f"bytes of {what}")
        if length > LONGEST_NAME:
            raise self.refuse(f"{what} has {length} bytes, over the limit of {LONGEST_NAME}")
        start = self.need(length)
        try:
            return self.raw[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is not UTF-8") from None

    def layout(self) -> GgufLayout:
        """The whole header, checked against the size of the file."""
        self.check_start()
        count = self.number("Q")
        if count > MOST_TENSORS:
            raise self.refuse(f"the header describes {count} tensors, over the limit of {MOST_TENSORS} for one file")
        values = self.values()
        alignment = self.alignment(values)
        table, tensors, problems = self.at, dict[str, TensorInfo](), list[str]()
        for _ in range(count):
            name = self.name("the name of a tensor")
            info = self.tensor(name, alignment, problems)
            if name in tensors:
                raise self.refuse(f"tensor {printable(name)} is listed twice")
            tensors[name] = info
        if problems:
            raise InputError(f"{printable(self.path)}: the header describes impossible tensors:", problems)
        self.need(min(-self.at % alignment, self.size - self.at))
        header = self.raw[: self.at]
        stop = self.check_tiling(tensors, len(header), alignment)
        return GgufLayout(header, tensors, None, values, table, alignment, stop, self.places)

    def check_start(self) -> None:
        """Magic and version."""
        head = self.read(0, min(64, self.size))
        if not head.startswith(MAGIC):
            if not head:
                raise self.refuse("the file is empty, probably after a failed download or a full disk")
            found = foreign_start(head) or (
                "of a format before GGUF; convert the model again" if head[:4] in OLD else ""
            )
            raise self.refuse(f"not a GGUF file{found and ': it is '}{found}")
        self.need(len(MAGIC))
        version = self.number("I")
        if version not in VERSIONS and version & 0xFFFF == 0:
            raise self.refuse("is a big-endian GGUF file; only little-endian ones are read")
        if version not in VERSIONS:
            raise self.refuse(f"is GGUF of version {version}; versions 2 and 3 are read, so convert the model again")

    def values(self) -> dict[str, Value]:
        """The metadata."""
        count = self.number("Q")
        if count > MOST_VALUES:
            raise self.refuse(f"its metadata has {count} entries, over the limit of {MOST_VALUES}")
        found: dict[str, Value] = {}
        for _ in range(count):
            start = self.at
            key = self.name("a key of its metadata")
            if key in found:
                raise self.refuse(f"the key {printable(key)} of its metadata is duplicated")
            found[key] = self.value(key, self.number("I"))
            self.places[key] = (start, self.at)
        return found

    def value(self, key: str, code: int) -> Value:
        if code in NUMBERS:
            number: int | float | bool = self.number(NUMBERS[code])
            return number
        if code == STRING:
            return self.string(key)
        if code == ARRAY:
            return self.array(key)
        raise self.refuse(f"the value of {printable(key)} is of an unknown type ({code})")

    def string(self, key: str) -> str:
        """The beginning of a string, which may be a whole chat template."""
        length = self.count(1, f"bytes of {printable(key)}")
        start = self.need(length)
        return self.raw[start : start + min(length, LONGEST_KEPT)].decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        """Move behind so many strings: a vocabulary has hundreds of thousands, so that each costs as little as can be."""
        raw, at, unpack = self.raw, self.at, LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > len(raw):
                self.at = at
                self.at, raw = self.need(8), self.raw
            at += 8 + unpack(raw, at)[0]
        self.at = at
        self.need(0)

    def array(self, key: str) -> Array:
        code = self.number("I")
        if code == STRING:
            count = self.count(8, f"texts in {printable(key)}")
            self.skip_texts(count)
            return Array(code, count)
        if code not in NUMBERS:
            kind = "is an array of arrays" if code == ARRAY else f"is an array of an unknown type ({code})"
            raise self.refuse(f"the value of {printable(key)} {kind}, which GGUF files of models do not have")
        width = struct.calcsize(f"<{NUMBERS[code]}")
        count = self.count(width, f"numbers in {printable(key)}")
        start = self.need(count * width)
        few = count <= LONGEST_KEPT
        return Array(code, count, struct.unpack_from(f"<{count}{NUMBERS[code]}", self.raw, start) if few else ())

    def alignment(self, values: Mapping[str, Value]) -> int:
        """What the position of every tensor is a multiple of."""
        found = values.get(KEY_OF_ALIGNMENT, 32)
        if type(found) is not int or not 0 < found <= LARGEST_ALIGNMENT or found & (found - 1):
            raise self.refuse(f"{KEY_OF_ALIGNMENT} must be a power of two, but it is {printable(found)}")
        return found

    def tensor(self, name: str, alignment: int, problems: list[str]) -> TensorInfo:
        """One entry of the list of tensors; what is wrong with it goes to `problems`."""
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise self.refuse(f"tensor {printable(name)} has {dimensions} dimensions; {MOST_DIMENSIONS} are the most")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        code, start = self.number("I"), self.number("Q")
        dtype, why = BY_CODE.get(code, ""), ""
        stop = start
        if not dtype:
            why = f"is of an unknown type ({code})"
        elif math.prod(size or 1 for size in shape) > LARGEST:  # a 0 among them hides nothing
            why = f"has more elements than 63 bits can count: {list(shape)}"
        elif (shape[-1] if shape else 1) % TYPES[dtype].values:
            why = f"has rows of {shape[-1] if shape else 1} values, not a multiple of a block of {dtype}"
        elif start % alignment:
            why = f"begins at byte {start}, not a multiple of {alignment}"
        else:
            stop = start + bytes_of(dtype, shape)
            if stop > self.size:
                why = f"takes bytes {start} to {stop}, but the file has {self.size}"
        if why:
            problems.append(f"{printable(name)}: {why}")
        return TensorInfo(name, dtype, shape, start, stop)

    def check_tiling(self, tensors: Mapping[str, TensorInfo], data_start: int, alignment: int) -> int:
        """The bytes of data; raises `InputError` where tensors overlap, leave gaps, or are not all there."""
        at, before = 0, "the header"
        for info in sorted(tensors.values(), key=lambda each: (each.start, each.stop)):
            if info.start != padded(at, alignment):
                what = "overlaps" if info.start < padded(at, alignment) else "leaves a gap after"
                where = f"(byte {info.start}, expected {padded(at, alignment)})"
                raise self.refuse(f"tensor {printable(info.name)} {what} {before} {where}")
            at, before = info.stop, f"tensor {printable(info.name)}"
        there = self.size - data_start
        if at > there:
            raise self.refuse(
                f"the file is truncated: {at - max(there, 0)} of {at} bytes of tensor data are missing; copy or download "
                "it again"
            )
        if there > padded(at, alignment):
            raise self.refuse(
                f"{there - padded(at, alignment)} extra bytes follow the last tensor; the file is corrupt"
            )
        return max(there, at)
