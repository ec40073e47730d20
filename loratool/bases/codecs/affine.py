"""Values of 8 bits in blocks of any size, each block with a scale and perhaps a zero: what torchao and quanto share."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs.parts import TORCH_NAMES, read_range, wrong_scales
from loratool.bases.packed import Packed
from loratool.bases.weights import Room
from loratool.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Affine(Packed):
    """Values of 8 bits in blocks of any size. `tensors`: qdata, scale, and perhaps zero_point."""

    blocks: tuple[int, ...]  # along each dimension; a block has one scale
    has_zero: bool = False
    sign: str = "positive"  # that the scales have, as for `wrong_scales`

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        qdata = self.tensors[0]
        raw = room.read(qdata, first * self.line, count * self.line, device)
        stored: torch.dtype = getattr(torch, TORCH_NAMES[qdata.info.dtype])
        values = raw.view(stored).view(count, self.blocks[-1], -1).float()
        rows = self.scale_rows(first, count)
        if self.has_zero:
            values.sub_(self.of_blocks(self.tensors[2], rows, device, room))
        return values.mul_(self.of_blocks(self.tensors[1], rows, device, room)).view(count, self.line)

    def scale_rows(self, first: int, count: int) -> Tensor:
        """For each of some lines, which row of the scales is its own."""
        lines, found, step = torch.arange(first, first + count), torch.zeros(count, dtype=torch.long), 1
        for size, blocks in zip(reversed(self.tensors[0].info.shape[:-1]), reversed(self.blocks[:-1]), strict=True):
            found += lines % size // (size // blocks) * step
            lines, step = lines // size, step * blocks
        return found

    def of_blocks(self, tensor: StoredTensor, rows: Tensor, device: torch.device, room: Room) -> Tensor:
        """Scales or zeros of some lines, (lines, blocks of a line, 1) of float32."""
        across, low = self.blocks[-1], int(rows.min())
        some = read_range(tensor, low * across, (int(rows.max()) + 1) * across, device, room).float()
        return some.view(-1, across)[(rows - low).to(device)][:, :, None]

    def check(self, room: Room) -> str:
        zeros = (wrong_scales(each, room) for each in self.tensors[2:3] if self.has_zero)
        return wrong_scales(self.tensors[1], room, self.sign) or next(filter(None, zeros), "")
