"""`StoredWeight`: one weight of a model, however its values lie on disk. Whoever wants a base's rows asks one for them.

`Plain` is a tensor of floats; `Slice` is some rows of another weight: a part of a fused one, or an expert of a stack;
`Stacked` is rows of several.
What decodes packed values is a stored weight as well, in `packed`.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from loratool.adapters.adapter import StoredTensor
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import DTYPE_BITS, FLOAT_NAMES
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch
    from torch import Tensor

Made = TypeVar("Made")
Whole = TypeVar("Whole", bound="StoredWeight")
WIDENED = ("BF16", "F16", "F32")  # what numpy reads as float32


class StoredWeight(Protocol):
    """One weight of a model. Its rows are those of the matrix that its first dimension and all others make."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""

    @property
    def dtype(self) -> str:
        """That of a plain copy, as safetensors names it."""

    @property
    def exact(self) -> str:
        """The narrowest dtype in which `rows` loses nothing that is stored."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those on disk that make it up."""

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        """Rows `first` … `first + count` as a (count, columns) matrix; nothing else is read.

        The result may lie in the memory of `room`, until the next call with it.
        """

    def matrix(self, columns: int) -> StoredWeight:
        """The same values, in their order, as a matrix of so many columns: all dimensions but the last ones are rows."""


@dataclass(frozen=True)
class HeldPart:
    """Packed values of some lines of a weight."""

    first: int
    stop: int
    values: Any  # (rows, columns) of a tensor, or of numpy
    place: object  # the device that they are on; "numpy" where they are numpy's


class Held:
    """What is worked out once for a weight and used for all of its rows, by whichever thread comes first: scales, tables.

    Where rows of a weight are columns on disk, it also holds a part of the packed values for each thread.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # what is made may need something else that is held
        self.made: dict[Hashable, Any] = {}
        self.parts: dict[int, HeldPart] = {}  # by thread

    def of(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for each key."""
        with self.lock:
            if key not in self.made:
                self.made[key] = make()
            made: Made = self.made[key]
            return made

    def part(self, first: int, stop: int, place: object, make: Callable[[], HeldPart]) -> HeldPart:
        """A part that has the lines `first` … `stop`: any thread's, else what `make` gives, as this thread's only one."""
        with self.lock:
            for part in self.parts.values():
                if part.first <= first and stop <= part.stop and part.place == place:
                    return part
            self.parts.pop(threading.get_ident(), None)  # its memory is free before more is taken
            part = self.parts[threading.get_ident()] = make()
            return part


@dataclass
class Room:
    """What `rows` may use again from call to call: open files, and memory for the bytes of one call."""

    sources: OpenSources = field(default_factory=OpenSources)
    host: Tensor | None = None  # (bytes,) of uint8
    twin: Tensor | None = None  # the same on a device; bytes go there in the order of its current stream
    held: Held = field(default_factory=Held)  # of the weight that is read, shared by all threads

    def read(self, tensor: StoredTensor, start: int, count: int, device: torch.device) -> Tensor:
        """Bytes `start` … `start + count` of a tensor, as (count,) of uint8."""
        import torch

        fits = self.host is not None and count <= self.host.numel()
        raw = self.host[:count] if self.host is not None and fits else torch.empty(count, dtype=torch.uint8)
        tensor.read(start, raw.numpy().data, self.sources)
        lap("read", count)
        if self.twin is None or not fits:
            return raw.to(device)
        return self.twin[:count].copy_(raw, non_blocking=True)


class Memory:
    """What a thread reads with by numpy: open files, and memory for bytes that is used again from call to call."""

    def __init__(self) -> None:
        self.sources, self.held = OpenSources(), Held()  # of the weight that is read
        self.raw = numpy.empty(0, numpy.uint8)

    def read(self, tensor: StoredTensor, start: int, count: int) -> NDArray[Any]:
        """Bytes `start` … `start + count` of a tensor, (count,) of uint8, until the next call."""
        if count > len(self.raw):
            self.raw = numpy.empty(count, numpy.uint8)
        raw = self.raw[:count]
        tensor.read(start, raw.data, self.sources)
        lap("read", count)
        return raw

    def small(self, tensor: StoredTensor, start: int, count: int) -> NDArray[Any]:
        """The same in memory of their own."""
        raw = numpy.empty(count, numpy.uint8)
        tensor.read(start, raw.data, self.sources)
        return raw


def widen(values: NDArray[Any], raw: NDArray[Any], dtype: str) -> None:
    """Put floats as they are stored, (bytes,) of uint8, into (count,) of float32; `dtype` is one of `WIDENED`."""
    if dtype == "BF16":
        bits = values.view(numpy.uint32)
        bits[:] = raw.view(numpy.uint16)
        numpy.left_shift(bits, 16, out=bits)
    else:
        values[:] = raw.view({"F16": numpy.float16, "F32": numpy.float32}[dtype])


@dataclass(frozen=True)
class Plain(StoredTensor):
    """A weight whose values are a tensor of a file, as they are."""

    @property
    def by_numpy(self) -> bool:
        return self.info.dtype in WIDENED

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        row = values.shape[1] * DTYPE_BITS[self.info.dtype] // 8
        widen(values.reshape(-1), memory.read(self, first * row, len(values) * row), self.info.dtype)

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def exact(self) -> str:
        return self.info.dtype

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self,)

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        import torch

        stored: torch.dtype = getattr(torch, FLOAT_NAMES[self.info.dtype])
        row = self.info.width * stored.itemsize
        return room.read(self, first * row, count * row, device).view(stored).view(count, -1).to(dtype)

    def matrix(self, columns: int) -> Plain:
        shape = (self.info.elements // max(columns, 1), columns)
        return (
            self
            if shape == self.info.shape
            else dataclasses.replace(self, info=dataclasses.replace(self.info, shape=shape))
        )


@dataclass(frozen=True)
class OfAnother:
    """A weight whose values are those of another one."""

    whole: StoredWeight

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def exact(self) -> str:
        return self.whole.exact

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.whole.tensors

    def matrix(self: Whole, columns: int) -> Whole:
        """Itself: its rows are those of a matrix. Raises `ValueError` for another number of columns."""
        if columns != math.prod(self.shape[1:]):
            raise ValueError(f"rows of {math.prod(self.shape[1:])} columns cannot be reshaped to {columns} columns")
        return self


@dataclass(frozen=True)
class Slice(OfAnother):
    """Some rows of a weight, and some columns of them: a part of a fused weight, or an expert of a stack."""

    first: int
    count: int
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, len(range(*self.columns.indices(math.prod(self.whole.shape[1:]))))

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        return self.whole.rows(self.first + first, count, device, dtype, room)[:, self.columns]


@dataclass(frozen=True)
class Filled(OfAnother):
    """A weight that is padded with zeros to a larger shape, for more inputs or outputs."""

    shape: tuple[int, ...]

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        import torch

        result = torch.zeros(count, *self.shape[1:], dtype=dtype, device=device)
        there = max(0, min(count, self.whole.shape[0] - first))
        if there:
            rows = self.whole.rows(first, there, device, dtype, room).view(there, *self.whole.shape[1:])
            result[tuple(map(slice, rows.shape))] = rows
        return result.view(count, -1)


@dataclass(frozen=True)
class Stacked:
    """Rows of several weights of one width, one after the other: a layer that another layout has in parts."""

    pieces: tuple[StoredWeight | int, ...]  # matrices; a number stands for so many rows of zeros
    experts: int = 0  # matrices that it is a stack of; 0 for one matrix

    @property
    def weights(self) -> tuple[StoredWeight, ...]:
        return tuple(piece for piece in self.pieces if not isinstance(piece, int))

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(piece if isinstance(piece, int) else piece.shape[0] for piece in self.pieces)
        width = self.weights[0].shape[1]
        return (self.experts, rows // self.experts, width) if self.experts else (rows, width)

    @property
    def dtype(self) -> str:
        return wider({weight.dtype for weight in self.weights})

    @property
    def exact(self) -> str:
        return wider({weight.exact for weight in self.weights})

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for weight in self.weights for tensor in weight.tensors)

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        import torch

        each, width = math.prod(self.shape[1:-1]), self.shape[-1]
        first, last = first * each, (first + count) * each
        result = torch.zeros(last - first, width, dtype=dtype, device=device)
        start = 0
        for piece in self.pieces:
            size = piece if isinstance(piece, int) else piece.shape[0]
            begin, end = max(first, start), min(last, start + size)
            if begin < end and not isinstance(piece, int):
                own = Room(room.sources)  # what a room holds is of one weight
                result[begin - first : end - first] = piece.rows(begin - start, end - begin, device, dtype, own)
            start += size
        return result.view(count, -1)

    def matrix(self, columns: int) -> Stacked:
        """All matrices as one. Raises `ValueError` for another number of columns."""
        if columns != self.shape[-1]:
            raise ValueError(f"rows of {self.shape[-1]} columns cannot be reshaped to {columns} columns")
        return dataclasses.replace(self, experts=0)


def wider(dtypes: set[str]) -> str:
    """The dtype that holds what several do."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"


def plain_of(base: Checkpoint, name: str) -> Plain:
    """A tensor that a file of a base holds."""
    home = base.homes[name]
    return Plain(home, home.tensors[name])


def as_weight(tensor: StoredTensor) -> Plain:
    """A tensor that takes a weight's place, as that weight."""
    return tensor if isinstance(tensor, Plain) else Plain(tensor.file, tensor.info)
