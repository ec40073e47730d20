"""The transpose of a packed matrix, which some tools pack where a layer keeps (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.bases.codecs.parameters import WithParameters
from loratool.bases.codecs.parts import held
from loratool.bases.packed import Packed, Requantizable
from loratool.bases.weights import Room
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.architectures import CONV1D_TYPES
from loratool.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Turned(WithParameters):
    """The transpose of a packed matrix: bitsandbytes and GPTQ turn weights of Conv1D layers, (in, out), for packing.

    Its rows are columns on disk, so all of it is decoded once and held, as float32, and packed anew all at once.
    """

    whole: Requantizable

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        def turned() -> Tensor:
            own = Room(room.sources)
            return self.whole.rows(0, self.whole.shape[0], torch.device("cpu"), torch.float32, own).T.contiguous()

        return held("turned", device, room, turned)[first : first + count].clone()

    def check(self, room: Room) -> str:
        return self.whole.check(room)

    def doubt(self, room: Room) -> str:
        return self.whole.doubt(room)

    @property
    def together(self) -> int:
        return self.shape[0]

    def measure(self, values: Tensor) -> Tensor:
        return self.whole.measure(values.T.contiguous())

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.whole.new_parameters(measured, own)

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.whole.encode(values.T.contiguous(), first, parameters)

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return self.whole.decode_packed(packed, first, self.whole.shape[0], parameters).T.contiguous()

    def laid_out(self, packed: Tensor) -> Tensor:
        return self.whole.laid_out(packed)

    @classmethod
    def of(cls, whole: Requantizable) -> Turned:
        rows, columns = whole.shape
        return cls(
            shape=(columns, rows),
            line=rows,
            dtype=whole.dtype,
            tensors=whole.tensors,
            scheme=whole.scheme,
            whole=whole,
        )


def as_layers_have_them(base: Checkpoint, found: Mapping[str, Requantizable]) -> dict[str, Packed]:
    """The packed weights of a base, those of Conv1D layers turned back."""
    turned = CONV1D_TYPES.get(base.model_type, frozenset())
    return {
        name: Turned.of(weight) if name.removesuffix(".weight").rpartition(".")[2] in turned else weight
        for name, weight in found.items()
    }
