"""One safetensors file: its header as a table of tensors, byte ranges in, planned bytes out.

The rules are those of the reference parser (safetensors 0.8.0, `read_metadata` and `validate`),
and stricter where it is silent: names may not repeat, and the header begins with `{`.
Nothing here loads a tensor, and nothing here knows torch. The package itself tells no offsets, which a planned output
needs, and maps files into memory, where one that shrinks ends the process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.errors import InputError, printable
from loratool.files.foreign_starts import archive, foreign_start, is_text
from loratool.files.source import Source, read_pieces
from loratool.files.stand_ins import stand_in, told_identity
from loratool.files.system import closing, copy_in_kernel, read_ahead, read_at, write_at
from loratool.files.untrusted import RepeatedKeyError, json_object, open_regular, reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


# Every dtype of the format and the bits of one element.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# The dtypes loratool computes in, by the names that torch and config files use.
FLOAT_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT_DIGITS: Mapping[str, int] = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}  # binary ones of a significand

LONGEST_HEADER = 100_000_000  # bytes; the reference parser's limit
MOST_TENSORS = 200_000  # of one file: a merge of more takes minutes and gigabytes before the first byte is moved
FIELDS = ("dtype", "shape", "data_offsets")
LARGEST_INT = 2**63 - 1
PREFIX = 8  # bytes: the header's length, little-endian


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `start` and `stop` count bytes from the first byte of tensor data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Entries of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """What tells whether a file is still the one whose header was read."""

    device: int
    inode: int
    size: int
    modified: int  # nanoseconds
    changed: int = 0  # nanoseconds; what nobody can set back

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Layout:
    """The head of a safetensors file, whether or not the file exists yet."""

    header: bytes  # length prefix and JSON, exactly as in the file
    tensors: Mapping[str, TensorInfo]  # in the header's order
    metadata: Mapping[str, str] | None

    @property
    def data_start(self) -> int:
        return len(self.header)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + max((t.stop for t in self.tensors.values()), default=0)

    @property
    def in_order(self) -> list[TensorInfo]:
        """The tensors in the order of their bytes."""
        return sorted(self.tensors.values(), key=lambda t: (t.start, t.stop))

    @property
    def padding(self) -> int:
        """Bytes of data that belong to no tensor, which are zero."""
        return 0

    def like(
        self, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> Layout:
        """That of an output of the same format, which holds (name, dtype, shape) triples in the given order."""
        return Layout.of(tensors, metadata)

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        length: int = 0,
    ) -> Layout:
        """Place (name, dtype, shape) triples one after the other, in the given order.

        The header is filled up with spaces to `length` bytes where it is shorter.
        """
        placed: dict[str, TensorInfo] = {}
        at = 0
        for name, dtype, shape in tensors:
            stop = at + math.prod(shape) * DTYPE_BITS[dtype] // 8
            placed[name] = TensorInfo(name, dtype, tuple(shape), at, stop)
            at = stop
        table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        for t in placed.values():
            table[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * max(-len(text) % 8, length - PREFIX - len(text))
        return cls(len(text).to_bytes(PREFIX, "little") + text, placed, metadata)


@dataclass(frozen=True)
class LocalSource:
    """The bytes of an open file on this machine, as a `Source`."""

    path: Path
    descriptor: int

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, start: int, count: int, into: memoryview) -> None:
        read_exactly(self.descriptor, into[:count], start, self.path)

    def expect(self, start: int, count: int) -> None:
        read_ahead(self.descriptor, start, count)

    def copy_to(self, descriptor: int, start: int, count: int, at: int) -> None:
        """Copy a range to byte `at` of another open file, inside the kernel where it can."""
        while count and (moved := copy_in_kernel(self.descriptor, descriptor, count, start, at)):
            start, count, at = start + moved, count - moved, at + moved
        copy_pieces(self, start, count, descriptor, at)


@dataclass(frozen=True)
class SafeFile:
    """A safetensors file whose header has been read and found valid."""

    is_own: ClassVar[bool] = True  # whether it is all of one file, which is here

    path: Path
    layout: Layout
    identity: Identity

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.layout.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header holds besides; empty where it holds nothing."""
        return self.layout.metadata or {}

    @property
    def config(self) -> Mapping[str, Any]:
        """What the file itself says of a model, in the words of a config of transformers."""
        return {}

    @contextmanager
    def open(self) -> Iterator[Source]:
        """Its bytes, after checking that the file is still the one that was planned with."""
        if (there := stand_in(self.path)) is not None:
            yield there.source(self.layout)
            return
        with closing(open_regular(self.path)) as descriptor:
            source = LocalSource(self.path, descriptor)
            self.check_unchanged(source)
            yield source

    def check_unchanged(self, source: Source | None = None) -> None:
        """Raise `InputError` when the file was changed, replaced or cut since its header was read."""
        if told_identity(self.path) is not None:
            return  # each answer of a store is held to the state of the object that was listed
        status = os.fstat(source.descriptor) if isinstance(source, LocalSource) else os.stat(self.path)
        if Identity.of(status) != self.identity:
            raise InputError(f"{printable(self.path)}: the file changed while it was being read; start again")

    def position(self, tensor: TensorInfo) -> int:
        """The byte of the file at which `tensor` begins."""
        return self.layout.data_start + tensor.start

    @property
    def files(self) -> tuple[SafeFile, ...]:
        """The files it is made of: itself."""
        return (self,)

    def home(self, name: str) -> SafeFile:  # noqa: ARG002 (there is but one)
        """The file that holds a tensor."""
        return self


def read_safefile(path: Path) -> SafeFile:
    """Read and check the header of one safetensors file; no tensor data is touched.

    Raises `InputError` when the file breaks a rule of the format, all offending tensors at once.
    """
    header, identity = read_header(path)
    tensors, metadata = parse_header(path, header[PREFIX:], identity.size - len(header))
    return SafeFile(path, Layout(header, tensors, metadata), told_identity(path) or identity)


def read_header(path: Path) -> tuple[bytes, Identity]:
    """The header of a file with the length before it, none of which is parsed, and what tells that it is the same file.

    Raises `InputError` as `header_length` does.
    """
    with reading(path), open(open_regular(path), "rb", buffering=0) as stream:
        identity = Identity.of(os.fstat(stream.fileno()))
        buffer = bytearray(PREFIX + header_length(path, stream.read(64), identity.size))
        read_exactly(stream.fileno(), memoryview(buffer), 0, path)
    return bytes(buffer), identity


def header_length(path: Path, head: bytes, size: int) -> int:
    """The header's length in bytes, after checking all that the first bytes can tell."""
    shown = printable(path)
    if size == 0:
        raise InputError(f"{shown}: the file is empty, probably after a failed download or a full disk")
    if told := archive(path):
        raise InputError(f"{shown}: {told}")
    begins_as_ours = head[PREFIX : PREFIX + 1] == b"{"  # a length of 640 reads like the start of a pickle
    if not begins_as_ours and (what := foreign_start(head)):
        raise InputError(f"{shown}: not a safetensors file: it is {what}")
    if path.suffix != ".safetensors" and is_text(head) and not head.lstrip().startswith(b"{"):
        raise InputError(f"{shown}: not a file of weights: it contains text")
    if size < PREFIX:
        raise InputError(
            f"{shown}: the file is truncated: {size} bytes are too few for a safetensors header; copy or download it again"
        )
    if not head.strip(b"\0"):
        raise InputError(f"{shown}: begins with zeros, probably an unfinished download")
    length = int.from_bytes(head[:PREFIX], "little")
    if length > LONGEST_HEADER:
        reason = f"its header would be {length} bytes, over the limit of {LONGEST_HEADER}"
        if head.lstrip().startswith(b"{"):
            reason = "it looks like JSON; pass its folder, or a .safetensors file"
        raise InputError(f"{shown}: not a safetensors file: {reason}")
    if PREFIX + length > size:
        raise InputError(
            f"{shown}: the file is truncated inside its header: {PREFIX + length - size} bytes of {length} are missing; copy or "
            "download it again"
        )
    return length


def parse_header(path: Path, raw: bytes, data_size: int) -> tuple[dict[str, TensorInfo], Mapping[str, str] | None]:
    """The tensors and the metadata that a header describes, checked against the bytes that follow it."""
    shown = printable(path)
    if not raw.startswith(b"{"):
        raise InputError(f"{shown}: the header does not begin with '{{'")
    if (count := raw.count(b'"data_offsets"')) > MOST_TENSORS:
        raise InputError(
            f"{shown}: the header describes {count} tensors, over the limit of {MOST_TENSORS} for one file"
        )
    try:
        table = json_object(raw)
    except RepeatedKeyError as error:
        raise InputError(
            f"{shown}: the header is not valid: the key {printable(repr(error.key))} is duplicated"
        ) from None
    except ValueError as error:
        raise InputError(f"{shown}: the header is not valid: {error}") from None
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise InputError(f"{shown}: __metadata__ must map strings to strings")
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, entry in table.items():
        try:
            tensors[name] = parse_entry(name, entry)
        except ValueError as error:
            problems.append(f"{printable(name)}: {error}")
    if problems:
        raise InputError(f"{shown}: the header describes impossible tensors:", problems)
    check_tiling(shown, tensors.values(), data_size)
    return tensors, metadata


def parse_entry(name: str, entry: object) -> TensorInfo:
    """One tensor of the header; `ValueError` says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("the entry must be an object with dtype, shape and data_offsets")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError:
        missing = [field for field in FIELDS if field not in entry]
        raise ValueError(f"{' and '.join(missing)} missing") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {printable(repr(dtype))}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not are_counts(shape):
        raise ValueError(f"shape {printable(json.dumps(shape))} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not are_counts(offsets):
        raise ValueError(f"data_offsets {printable(json.dumps(offsets))} are not two byte positions")
    start, stop = offsets
    if start > stop:
        raise ValueError(f"data_offsets go backwards, from {start} to {stop}")
    elements = 1
    for n in shape:  # left to right, as the reference does: 2^40 × 2^40 × 0 overflows there
        elements *= n
        if elements > 2 * LARGEST_INT + 1:
            raise ValueError(f"shape {shape} has more elements than 64 bits can count")
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{elements} values of {dtype} do not fill whole bytes")
    if bits // 8 != stop - start:
        raise ValueError(f"{dtype} of shape {shape} takes {bits // 8} bytes, but data_offsets span {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), start, stop)


def check_tiling(shown: str, tensors: Iterable[TensorInfo], data_size: int) -> None:
    """Tensors must fill the data without hole, overlap or rest."""
    at, before = 0, ""
    for t in sorted(tensors, key=attrgetter("start", "stop")):
        if t.start != at:
            what = "overlaps" if t.start < at else "leaves a gap after"
            where = f"tensor {printable(before)}" if before else "the header"
            raise InputError(f"{shown}: tensor {printable(t.name)} {what} {where} (byte {t.start}, expected {at})")
        at, before = t.stop, t.name
    if at > data_size:
        raise InputError(
            f"{shown}: the file is truncated: {at - data_size} of {at} bytes of tensor data are missing; copy or "
            "download it again"
        )
    if at < data_size:
        raise InputError(f"{shown}: {data_size - at} extra bytes follow the last tensor; the file is corrupt")


def are_counts(values: Iterable[object]) -> bool:
    """Whether all are non-negative integers of the format: no bool, no float, at most 63 bits."""
    for value in values:  # noqa: SIM110 (of hundreds of thousands of tensors: a generator takes three times as long)
        if type(value) is not int or not 0 <= value <= LARGEST_INT:
            return False
    return True


def read_exactly(descriptor: int, buffer: memoryview, position: int, path: Path) -> None:
    """Fill `buffer` from `position` on. Loops: one read stops at 2 GiB and may stop earlier."""
    done = 0
    while done < len(buffer):
        count = read_at(descriptor, buffer[done:], position + done)
        if count == 0:
            raise InputError(f"{printable(path)}: the file ended early; it was truncated while being read")
        done += count


def write_fully(descriptor: int, buffer: memoryview | bytes, position: int) -> None:
    """Write all of `buffer` at `position`; a short write goes on where it stopped."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        done += write_at(descriptor, view[done:], position + done)


def copy_range(source: Source, start: int, count: int, target: int, at: int) -> None:
    """Copy bytes of a source to byte `at` of an open file."""
    if isinstance(source, LocalSource):
        source.copy_to(target, start, count, at)
    else:
        copy_pieces(source, start, count, target, at)


def copy_pieces(source: Source, start: int, count: int, target: int, at: int) -> None:
    """The same by way of memory."""
    for piece in read_pieces(source, start, start + count):
        write_fully(target, piece, at)
        at += len(piece)
