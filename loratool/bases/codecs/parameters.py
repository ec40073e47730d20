"""Scales, zero points and indices of packed weights, on disk or in memory: those of some lines, as float32."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs.byte_values import e4m3, e8m0
from loratool.bases.codecs.parts import held, read_range, read_whole
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room
from loratool.lazy import Tensor, torch

POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two
SCALES = ("F32", "BF16", "F16")  # dtypes of other scales


class Parameters(Protocol):
    """Where the parameters of a weight are read from."""

    @property
    def device(self) -> torch.device: ...

    def some(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Values `start` … `stop` of a tensor, numbered row by row, in their dtype on disk and memory of their own."""

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of a small tensor, always the same of each. Nobody changes it."""


@dataclass(frozen=True)
class OnDisk:
    """Parameters as they lie in the base."""

    device: torch.device
    room: Room

    def some(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        if self.device.type == "cpu":
            return read_range(tensor, start, stop, self.device, self.room)
        # read once: each copy to a device from memory that is not pinned waits for all that was begun there before
        whole = held(
            f"all of {tensor.info.name}", self.device, self.room, lambda: read_whole(tensor, self.room).flatten()
        )
        return whole[start:stop].clone()

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        return held(tensor.info.name, self.device, self.room, lambda: make(read_whole(tensor, self.room)))


@dataclass(frozen=True)
class InMemory:
    """Parameters by name, in their shapes and dtypes on disk."""

    device: torch.device
    tensors: Mapping[str, Tensor]

    def some(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        return self.tensors[tensor.info.name].reshape(-1)[start:stop].to(self.device, copy=True)

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        return make(self.tensors[tensor.info.name]).to(self.device)


@dataclass(frozen=True, kw_only=True)
class WithParameters(Requantizable):
    """One all of whose tensors but the first are its parameters."""

    def parameters(self, room: Room) -> Mapping[str, Tensor]:
        return {tensor.info.name: read_whole(tensor, room) for tensor in self.tensors[1:]}


@dataclass(frozen=True, kw_only=True)
class LineByLine(WithParameters):
    """One whose packed values lie line after line, on disk as in memory."""

    @abstractmethod
    def scaled(self, raw: Tensor, first: int, count: int, parameters: Parameters) -> Tensor:
        """Lines out of the bytes that hold them, (count, line) of float32."""

    def span(self, first: int, count: int) -> tuple[int, int]:
        """The first of the bytes that hold some lines, and their number. By default a value is a byte."""
        return first * self.line, count * self.line

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        raw = room.read(self.tensors[0], *self.span(first, count), device)
        return self.scaled(raw, first, count, OnDisk(device, room))

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.scaled(packed, first, count, InMemory(packed.device, parameters))


def as_float32(values: Tensor) -> Tensor:
    """Parameters as they are stored, as float32 in memory of their own; bytes are powers of two."""
    if values.dtype == torch.uint8:
        return e8m0(values)
    if values.dtype == torch.float8_e4m3fn:
        return e4m3(values.view(torch.uint8))
    return values.to(torch.float32, copy=True)
