"""Scales, zero points and indices of packed weights, on disk or in memory: those of some lines, as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs.byte_values import e4m3, e8m0
from loratool.bases.codecs.parts import TORCH_NAMES
from loratool.bases.weights import Room
from loratool.lazy import Tensor, torch

POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two
SCALES = ("F32", "BF16", "F16")  # dtypes of other scales


class Parameters(Protocol):
    """Where the parameters of a weight are read from."""

    @property
    def device(self) -> torch.device: ...

    def read(self, tensor: StoredTensor, start: int, count: int) -> Tensor:
        """Some bytes of a tensor, as (count,) of uint8 in memory that may be changed."""
        ...

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of all bytes of a small tensor. Nobody changes it."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """Parameters as they lie in the base."""

    device: torch.device
    room: Room

    def read(self, tensor: StoredTensor, start: int, count: int) -> Tensor:
        return Room(self.room.sources).read(tensor, start, count, self.device)

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        key = tensor.info.name, self.device
        return self.room.held.of(key, lambda: make(self.read(tensor, 0, tensor.info.nbytes)))


@dataclass(frozen=True)
class InMemory:
    """Parameters by name, in their shapes and dtypes on disk."""

    device: torch.device
    tensors: Mapping[str, Tensor]

    def read(self, tensor: StoredTensor, start: int, count: int) -> Tensor:
        raw = self.tensors[tensor.info.name].reshape(-1).view(torch.uint8)
        return raw[start : start + count].to(self.device, copy=True)

    def kept(self, tensor: StoredTensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        return make(self.read(tensor, 0, tensor.info.nbytes))


def as_float32(raw: Tensor, dtype: str) -> Tensor:
    """Values of a tensor that lies in a file as (bytes,), as (n,) of float32 in memory of their own."""
    if dtype in POWERS:
        return e8m0(raw)
    if dtype == "F8_E4M3":
        return e4m3(raw)
    stored: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return raw.view(stored).to(torch.float32, copy=True)
