"""GGUF: blocks of 32 or 256 values with their scales among them, as llama.cpp packs rows.

Values are those that the `gguf` package (llama.cpp's own, in numpy) decodes, in float32; the common types are decoded
without it, in `gguf_blocks`. Types for which it has no encoder are read only; the others can be written too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from loratool.bases.codecs.gguf_blocks import DECODERS, decode_into, decoded
from loratool.bases.packed import Codec, Packed, Packing, WithoutParameters
from loratool.bases.packing_settings import Settings
from loratool.bases.weights import Memory, Plain, Room, plain_of
from loratool.errors import InputError
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile, bytes_of
from loratool.files.safefile import TensorInfo
from loratool.layouts.ggml import DECODED, ENCODED, TYPES
from loratool.lazy import NDArray, Tensor, numpy, torch

if TYPE_CHECKING:
    from loratool.bases.weights import StoredWeight

INSTALL = 'pip install "loratool[gguf]"'


@cache
def package() -> Any:
    """`gguf.quants`. Raises `InputError` where it is not installed."""
    try:
        from gguf import quants
    except ImportError:
        raise InputError("quantised GGUF weights need the package gguf, which is not installed", hint=INSTALL) from None
    return quants


def unpacked(raw: Tensor, kind: str, line: int) -> Tensor:
    """(lines, line) of float32 on the device of `raw`, the bytes of whole lines of a type."""
    if kind in DECODERS:
        return decoded(raw, kind).view(-1, line)
    quants = package()
    rows = raw.cpu().numpy().reshape(-1, bytes_of(kind, (line,)))
    values = numpy.ascontiguousarray(quants.dequantize(rows, quants.GGMLQuantizationType[kind]))
    return torch.from_numpy(values).to(raw.device)


@dataclass(frozen=True, kw_only=True)
class Blocks(Packed):
    """A weight in blocks of one of llama.cpp's types. A line is a row."""

    kind: str  # the type

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        width = bytes_of(self.kind, (self.line,))
        place = device if self.kind in DECODERS else torch.device("cpu")
        raw = room.read(self.tensors[0], first * width, count * width, place)
        return unpacked(raw, self.kind, self.line).to(device)

    @property
    def by_numpy(self) -> bool:
        return self.kind in DECODERS

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        width = bytes_of(self.kind, (self.line,))
        raw = memory.read(self.tensors[0], first * width, len(values) * width)
        decode_into(values.reshape(-1), raw, self.kind)


@dataclass(frozen=True, kw_only=True)
class Repacked(WithoutParameters):
    """A weight whose output is in blocks of one of llama.cpp's types, whatever the type it is read from."""

    source: StoredWeight
    kind: str  # of the output

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        return self.source.matrix(self.line).rows(first, count, device, torch.float32, room)

    @property
    def by_numpy(self) -> bool:
        return isinstance(self.source, Blocks) and self.source.by_numpy

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        assert isinstance(self.source, Blocks)
        self.source.decode_into(values, first, memory)

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        quants = package()
        packed = quants.quantize(values.cpu().numpy(), quants.GGMLQuantizationType[self.kind])
        return torch.from_numpy(packed.reshape(-1)).to(values.device)

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return unpacked(packed, self.kind, self.line)


def blocks_of(tensor: Plain) -> Packed:
    """The weight that a tensor of a GGUF file holds."""
    info = tensor.info
    read = Blocks(
        shape=info.shape, line=info.shape[-1], dtype="BF16", tensors=(tensor,), scheme=info.dtype, kind=info.dtype
    )
    return repacked(read, info.dtype) if info.dtype in ENCODED else read


def repacked(weight: StoredWeight, kind: str) -> Repacked:
    """A weight that goes to the output in a type of llama.cpp's."""
    shape = weight.shape
    return Repacked(
        shape=shape,
        line=shape[-1],
        dtype="BF16",
        tensors=weight.tensors,
        scheme=kind,
        source=weight.source if isinstance(weight, Repacked) else weight,
        kind=kind,
    )


def packed_info(name: str, kind: str, shape: tuple[int, ...]) -> TensorInfo:
    """What a header says of a tensor of some type, wherever it lies."""
    return TensorInfo(name, kind, shape, 0, bytes_of(kind, shape))


class Gguf(Codec):
    """GGUF as llama.cpp writes it."""

    name, title = "gguf", "GGUF"

    def find(self, base: Checkpoint, settings: Settings) -> Packing | None:  # noqa: ARG002 (the header says all of it)
        if not all(isinstance(shard, GgufFile) for shard in base.shards):
            return None
        packed = {name: info.dtype for name, info in base.tensors.items() if TYPES[info.dtype].values > 1}
        weights = {name: blocks_of(plain_of(base, name)) for name, kind in packed.items() if kind in DECODED}
        unread = {name: kind for name, kind in packed.items() if kind not in DECODED}
        return Packing(weights, unread=unread) if packed else None
