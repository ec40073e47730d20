"""Values of 8 bits in blocks of any size, each block with a scale and perhaps a zero: what torchao and quanto share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs.numbers import BY_DTYPE, Numbers
from loratool.bases.codecs.parameters import InMemory, LineByLine, Parameters
from loratool.bases.codecs.parts import wrong_scales
from loratool.bases.weights import Room
from loratool.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Affine(LineByLine):
    """Values of 8 bits in blocks of any size. `tensors`: qdata, scale, and perhaps zero_point, and others."""

    blocks: tuple[int, ...]  # along each dimension; a block has one scale
    has_zero: bool = False
    sign: str = "positive"  # that the scales have, as for `wrong_scales`
    bits: int = 8  # of the values that are used

    @property
    def numbers(self) -> Numbers:
        """Those that bytes on disk are."""
        return BY_DTYPE[self.tensors[0].info.dtype]

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        if self.bits == 8:
            return self.numbers.least, self.numbers.greatest
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Of the values on disk, however they are seen."""
        return self.tensors[0].info.shape

    def scaled(self, raw: Tensor, first: int, count: int, parameters: Parameters) -> Tensor:
        scale, zero = self.of_lines(first, count, parameters)
        values = self.numbers.floats(raw).view(count, self.blocks[-1], -1)
        if zero is not None:
            values.sub_(zero)
        return values.mul_(scale).view(count, self.line)

    def of_lines(self, first: int, count: int, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of the blocks of some lines, (lines, blocks of a line, 1) of float32."""
        rows, across = self.scale_rows(first, count), self.blocks[-1]
        low, high = int(rows.min()), int(rows.max())

        def of_blocks(tensor: StoredTensor) -> Tensor:
            some = parameters.some(tensor, low * across, (high + 1) * across)
            return some.float().view(-1, across, 1)[(rows - low).to(some.device)]

        return of_blocks(self.tensors[1]), of_blocks(self.tensors[2]) if self.has_zero else None

    def scale_rows(self, first: int, count: int) -> Tensor:
        """For each of some lines, which row of the scales is its own."""
        lines, found, step = torch.arange(first, first + count), torch.zeros(count, dtype=torch.long), 1
        for size, blocks in zip(reversed(self.values_shape[:-1]), reversed(self.blocks[:-1]), strict=True):
            found += lines % size // (size // blocks) * step
            lines, step = lines // size, step * blocks
        return found

    def check(self, room: Room) -> str:
        zeros = (wrong_scales(each, room) for each in self.tensors[2:3] if self.has_zero)
        return wrong_scales(self.tensors[1], room, self.sign) or next(filter(None, zeros), "")

    def measure(self, values: Tensor) -> Tensor:
        """The largest magnitude in each block of each line: (lines, blocks of a line)."""
        return values.reshape(len(values), self.blocks[-1], -1).abs().amax(2)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Scales that spread the largest magnitudes over all values, around zeros of 0."""
        name = self.tensors[1].info.name
        rows = self.scale_rows(0, len(measured))
        largest = torch.zeros(int(rows.max()) + 1, measured.shape[1])
        largest.scatter_reduce_(0, rows[:, None].expand_as(measured), measured.cpu(), "amax")
        scale = (largest / max(self.limits[1], 1)).to(own[name].dtype)  # of one bit the values are -1 and 0
        smallest = torch.finfo(scale.dtype).tiny  # of a block of zeros, which have no scale
        found = {**own, name: scale.clamp_(min=smallest).view(own[name].shape)}
        if self.has_zero:
            zero = self.tensors[2].info.name
            found[zero] = torch.zeros_like(own[zero])
        return found

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        scale, zero = self.of_lines(first, len(values), InMemory(values.device, parameters))
        steps = values.reshape(len(values), self.blocks[-1], -1) / scale
        if zero is not None:
            steps.add_(zero)
        return self.numbers.bytes(steps.clamp_(*self.limits)).flatten()
