"""`StoredWeight`: one weight of a model, however its values lie on disk. Whoever wants a base's rows asks one for them.

`Plain` is a tensor of floats; `Slice` is some rows of another weight: a part of a fused one, or an expert of a stack.
What decodes packed values is a stored weight as well, in `codecs`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from loratool.adapters.adapter import StoredTensor
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.files.stopwatch import lap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

    from loratool.files.safefile import SafeFile

PACKING = "quantization_config"  # the entry of config.json that tells how weights are packed


class StoredWeight(Protocol):
    """One weight of a model. Its rows are those of the matrix that its first dimension and all others make."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        ...

    @property
    def dtype(self) -> str:
        """That of a plain copy, as safetensors names it."""
        ...

    @property
    def exact(self) -> str:
        """The narrowest dtype in which `rows` loses nothing that is stored."""
        ...

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those on disk that make it up."""
        ...

    def rows(
        self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room | None = None
    ) -> Tensor:
        """Rows `first` … `first + count` as a (count, columns) matrix; nothing else is read.

        With a `room` the result may lie in its memory, until the next call with it.
        """
        ...

    def matrix(self, columns: int) -> StoredWeight:
        """The same values, in their order, as a matrix of so many columns: all dimensions but the last ones are rows."""
        ...


@dataclass
class Room:
    """What `rows` may use again from call to call: open files, and memory for the bytes of one call."""

    sources: OpenSources = field(default_factory=OpenSources)
    host: Tensor | None = None  # (bytes,) of uint8
    twin: Tensor | None = None  # the same on a device; bytes go there in the order of its current stream

    def read(self, tensor: StoredTensor, start: int, count: int, device: torch.device) -> Tensor:
        """Bytes `start` … `start + count` of a tensor, as (count,) of uint8."""
        import torch

        raw = torch.empty(count, dtype=torch.uint8) if self.host is None else self.host[:count]
        tensor.read(start, raw.numpy().data, self.sources)
        lap("read", count)
        if self.twin is None:
            return raw.to(device)
        return self.twin[:count].copy_(raw, non_blocking=True)


@dataclass(frozen=True)
class Plain(StoredTensor):
    """A weight whose values are a tensor of a file, as they are."""

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def exact(self) -> str:
        return self.info.dtype

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self,)

    def rows(
        self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room | None = None
    ) -> Tensor:
        import torch

        if room is None:
            with OpenSources() as sources:
                return self.rows(first, count, device, dtype, Room(sources))
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
class Slice:
    """Some rows of a weight, and some columns of them: a part of a fused weight, or an expert of a stack."""

    whole: StoredWeight
    first: int
    count: int
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, ...]:
        width = math.prod(self.whole.shape[1:])
        return self.count, len(range(*self.columns.indices(width)))

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def exact(self) -> str:
        return self.whole.exact

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.whole.tensors

    def rows(
        self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room | None = None
    ) -> Tensor:
        return self.whole.rows(self.first + first, count, device, dtype, room)[:, self.columns]

    def matrix(self, columns: int) -> StoredWeight:
        """Itself: it is a matrix. Raises `ValueError` for another number of columns."""
        if columns != self.shape[1]:
            raise ValueError(f"a slice of {self.shape[1]} columns cannot be reshaped to {columns} columns")
        return self


@dataclass(frozen=True)
class Decoded(Checkpoint):
    """A checkpoint whose packed weights are seen as plain ones: each has its own name, its parts have none."""

    weights: Mapping[str, StoredWeight] = field(default_factory=dict)  # by the name of the plain copy

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: weight.info if isinstance(weight, Plain) else TensorInfo(name, weight.dtype, weight.shape, 0, 0)
            for shard in self.shards
            for name, weight in weights_in(self, shard)
        }

    @cached_property
    def packed(self) -> Mapping[str, str]:
        """Tensor of a packed weight → the weight's name at the first of them, nothing at the others."""
        return {
            tensor.info.name: name if tensor is weight.tensors[0] else ""
            for name, weight in self.weights.items()
            for tensor in weight.tensors
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json` of the plain model."""
        return {key: value for key, value in super().config.items() if key != PACKING}


def weights_in(base: Checkpoint, shard: SafeFile) -> Iterator[tuple[str, StoredWeight]]:
    """The weights of a shard with their names, in the order of their bytes; a packed one is where its first tensor is."""
    for info in sorted(shard.tensors.values(), key=lambda info: (info.start, info.stop)):
        if not isinstance(base, Decoded) or info.name not in base.packed:
            yield info.name, Plain(shard, info)
        elif name := base.packed[info.name]:
            yield name, base.weights[name]


def weight_of(base: Checkpoint, name: str) -> StoredWeight:
    """A weight of a base, by the name that it has there."""
    packed = base.weights.get(name) if isinstance(base, Decoded) else None
    return packed or plain_of(base, name)


def plain_of(base: Checkpoint, name: str) -> Plain:
    """A tensor that a file of a base holds."""
    home = next(shard for shard in base.shards if name in shard.tensors)
    return Plain(home, home.tensors[name])


def as_weight(tensor: StoredTensor) -> Plain:
    """A tensor that takes a weight's place, as that weight."""
    return tensor if isinstance(tensor, Plain) else Plain(tensor.file, tensor.info)
