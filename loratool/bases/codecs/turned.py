"""The transpose of a packed matrix, which some tools pack where a layer keeps (in, out)."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.bases.codecs.parts import held
from loratool.bases.packed import Packed
from loratool.bases.weights import Room
from loratool.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Turned(Packed):
    """The transpose of a packed matrix: bitsandbytes and GPTQ turn weights of Conv1D layers, (in, out), for packing.

    Its rows are columns on disk, so all of it is decoded once and held, as float32.
    """

    whole: Packed

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        def turned() -> Tensor:
            own = Room(room.sources)
            return self.whole.rows(0, self.whole.shape[0], torch.device("cpu"), torch.float32, own).T.contiguous()

        return held("turned", device, room, turned)[first : first + count].clone()

    def check(self, room: Room) -> str:
        return self.whole.check(room)

    def doubt(self, room: Room) -> str:
        return self.whole.doubt(room)

    @classmethod
    def of(cls, whole: Packed) -> Turned:
        rows, columns = whole.shape
        return cls(
            shape=(columns, rows),
            line=rows,
            dtype=whole.dtype,
            tensors=whole.tensors,
            scheme=whole.scheme,
            whole=whole,
        )
