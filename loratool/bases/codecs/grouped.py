"""Integers of a few bits in groups of inputs, each group with a scale and a zero point for each output: GPTQ and AWQ.

    W[o, i] = scale[o, g] · (q[o, i] − zero[o, g]), where g is the group of input i

The difference is exact, so there is one rounding, that of the multiplication in float32; with scales of 16 bits and
integers of at most 8 there is none.

Rows of W are columns on disk. So all packed values of a module are held in memory while it is decoded, shared by all
threads: `bits` / 8 bytes a value, which is 29 MB for 4096 x 14336 in 4 bits, with its scales (0.9 MB for groups of 128
inputs) and zero points (0.5 MB). Each block cuts its columns out, and turns them while they are in the cache.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from loratool.bases.codecs.parts import held, read_whole, wrong_scales
from loratool.bases.packed import Packed
from loratool.bases.weights import Room
from loratool.errors import printable
from loratool.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Grouped(Packed):
    """A matrix (outputs, inputs).

    `tensors`: the packed values, their packed zero points, their scales (groups, outputs), and perhaps the group of each
    input, (inputs,).
    """

    bits: int
    group: int  # inputs in a group

    @abstractmethod
    def integers(self, words: Tensor, first: int, count: int) -> Tensor:
        """Those of the outputs `first` … `first + count`, (count, inputs) of uint8, out of the packed values."""

    @abstractmethod
    def zero_points(self, words: Tensor) -> Tensor:
        """(groups, words) of int32 as stored → (groups, outputs) of uint8."""

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        words = held("values", device, room, lambda: read_whole(self.tensors[0], room))
        groups = held("groups", device, room, lambda: self.groups(room))
        integers = self.integers(words, first, count)
        scale = held("scales", device, room, lambda: self.scales(room))[first : first + count].float()
        zero = held("zeros", device, room, lambda: self.zeros(room))[first : first + count]
        if len(groups):
            scale = scale.index_select(1, groups)
            zero = zero.gather(1, groups.expand(count, -1))
        else:
            integers = integers.view(count, -1, self.group)
            scale, zero = scale[:, :, None], zero[:, :, None]
        return difference(integers, zero, self.bits).mul_(scale).view(count, -1)

    def scales(self, room: Room) -> Tensor:
        """(outputs, groups), as stored."""
        return read_whole(self.tensors[2], room).T.contiguous()

    def zeros(self, room: Room) -> Tensor:
        """(outputs, groups) of uint8."""
        return self.zero_points(read_whole(self.tensors[1], room)).T.contiguous()

    def groups(self, room: Room) -> Tensor:
        """The group of each input, (inputs,) of int64; none where every `group` inputs in a row are one."""
        in_order = torch.arange(self.line) // self.group
        groups = read_whole(self.tensors[3], room).long() if len(self.tensors) > 3 else in_order
        return groups[:0] if self.line % self.group == 0 and torch.equal(groups, in_order) else groups

    def check(self, room: Room) -> str:
        scales = self.tensors[2]
        if wrong := wrong_scales(scales, room, "not zero"):  # AutoRound writes negative ones
            return wrong
        if len(self.tensors) > 3:
            name, groups, number = self.tensors[3].info.name, read_whole(self.tensors[3], room), scales.info.shape[0]
            outside = groups[(groups < 0) | (groups >= number)]
            if len(outside):
                return (
                    f"{printable(name)}: {len(outside)} of {len(groups)} values, such as {int(outside[0])}, are not "
                    f"one of the {number} groups"
                )
        return ""


def difference(integers: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Integers minus their zero points, both of uint8, as float32."""
    if bits < 8:  # int8 holds it, and is a quarter of what float32 would move
        return (integers.view(torch.int8) - zeros.view(torch.int8)).float()
    return integers.float().sub_(zeros)
