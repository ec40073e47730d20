"""Integers of a few bits in groups of inputs, each group with a scale and a zero point for each output: GPTQ and AWQ.

    W[o, i] = scale[o, g] · (q[o, i] − zero[o, g]), where g is the group of input i

The difference is exact, so there is one rounding, that of the multiplication in float32; with scales of 16 bits and
integers of at most 8 there is none.

Rows of W are columns on disk. So each thread reads all packed values of a module in passing and holds some columns: those
of a block and of the next ones, 2 MB or an eighth of all, which is 3.7 MB for 4096 x 14336 in 4 bits. Scales (0.9 MB for
groups of 128 inputs) and zero points (0.5 MB) are held whole, for all threads. Each block cuts its columns out, and turns
them while they are in the cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from loratool.bases.codecs import numpy_values
from loratool.bases.codecs.parameters import WithParameters
from loratool.bases.codecs.parts import floats_of, held, integers_of, read_whole, wrong_scales
from loratool.bases.weights import WIDENED, HeldPart, Memory, Room
from loratool.errors import printable
from loratool.files.open_sources import OpenSources
from loratool.lazy import NDArray, Tensor, numpy, torch

PART = 2 << 20  # bytes of packed values that a thread holds
MOST_READINGS = 8  # of all packed values of a weight, each for a part of them; parts of large weights are larger for it
PIECE = 1 << 20  # bytes that are read at a time, and stay in the cache


class Grid(NamedTuple):
    """What makes integers of some outputs values."""

    scales: Tensor  # (outputs, groups) of float32
    zeros: Tensor  # (outputs, groups) of uint8
    groups: Tensor  # (inputs,) of int64, the group of each; empty where every so many inputs in a row are one


@dataclass(frozen=True, kw_only=True)
class Grouped(WithParameters):
    """A matrix (outputs, inputs).

    `tensors`: the packed values, their packed zero points, their scales (groups, outputs), and perhaps the group of each
    input, (inputs,).
    """

    bits: int
    group: int  # inputs in a group
    least_zero: int = 0  # among new zero points

    @abstractmethod
    def integers(self, words: Tensor, first: int, count: int) -> Tensor:
        """Those of the outputs `first` … `first + count`, (count, inputs) of uint8, out of the packed values."""

    @abstractmethod
    def words(self, integers: Tensor) -> Tensor:
        """(outputs, inputs) of uint8 → the columns of packed values that they are, each a row, of int32."""

    @abstractmethod
    def zero_points(self, words: Tensor) -> Tensor:
        """(groups, words) of int32 as stored → (groups, outputs) of uint8."""

    @abstractmethod
    def stored_zeros(self, zeros: Tensor) -> Tensor:
        """(groups, outputs) of uint8 → (groups, words) of int32 as stored."""

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        part = room.held.part(first, first + count, device, lambda: self.columns(first, count, device, room))
        scales = held("scales", device, room, lambda: rows_of(read_whole(self.tensors[2], room).T))
        zeros = held("zeros", device, room, lambda: rows_of(self.zero_points(read_whole(self.tensors[1], room)).T))
        groups = held("groups", device, room, lambda: self.groups(room))
        which = slice(first, first + count)
        integers = self.integers(part.values, first - part.first, count)
        return self.scaled(integers, Grid(scales[which].float(), zeros[which], groups))

    @property
    def by_numpy(self) -> bool:
        return self.bits == 4 and self.tensors[2].info.dtype in WIDENED

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        count = len(values)
        read = partial(memory.read, self.tensors[0])
        start, stop = self.columns_from(first, count)
        part = memory.held.part(first, first + count, "numpy", lambda: self.part(start, stop, "numpy", read))
        scales, zeros, groups = memory.held.of("grid by numpy", lambda: self.grid_by_numpy(memory))
        which = slice(first, first + count)
        integers = numpy.ascontiguousarray(self.integers_by_numpy(part.values, first - part.first, count))
        integers = integers.view(numpy.int8)
        if len(groups):
            numpy.copyto(values, integers - zeros[which].take(groups, 1))
            values *= scales[which].take(groups, 1)
            return
        parted = integers.reshape(count, -1, self.group)
        numpy.subtract(parted, zeros[which, :, None], out=parted)
        numpy.copyto(values, integers)
        numpy_values.multiply(values, scales[which], self.group)

    def part(self, start: int, stop: int, place: object, read: Callable[[int, int], NDArray[Any]]) -> HeldPart:
        """Columns of packed values, (rows, columns) of int32 as they lie on disk; `read` gives some of their bytes."""
        rows, width = self.tensors[0].info.shape
        found, step = numpy.empty((rows, stop - start), numpy.int32), max(1, PIECE // (4 * width))
        for at in range(0, rows, step):
            number = min(step, rows - at)
            raw = read(4 * at * width, 4 * number * width)
            found[at : at + number] = raw.view(numpy.int32).reshape(number, width)[:, start:stop]
        return HeldPart(start * self.together, stop * self.together, found, place)

    def grid_by_numpy(self, memory: Memory) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """As `Grid`; zero points are int8."""
        shape = self.tensors[2].info.shape
        scales = floats_of(self.tensors[2], memory.sources).reshape(shape)
        words = integers_of(self.tensors[1], memory.sources)
        zeros = self.zeros_by_numpy(words)[:, : shape[1]].view(numpy.int8)
        in_order: NDArray[Any] = numpy.arange(self.line) // self.group
        groups = integers_of(self.tensors[3], memory.sources) if len(self.tensors) > 3 else in_order
        in_turns = self.line % self.group == 0 and numpy.array_equal(groups, in_order)
        by_output = numpy.ascontiguousarray(scales.T), numpy.ascontiguousarray(zeros.T)
        return *by_output, groups[:0] if in_turns else groups

    @abstractmethod
    def integers_by_numpy(self, words: NDArray[Any], first: int, count: int) -> NDArray[Any]:
        """As `integers`, where they are of 4 bits, in memory of their own."""

    @abstractmethod
    def zeros_by_numpy(self, words: NDArray[Any]) -> NDArray[Any]:
        """As `zero_points`, where they are of 4 bits; perhaps some more."""

    @property
    def memory(self) -> int:
        return min(self.tensors[0].info.nbytes, max(PART, self.tensors[0].info.nbytes // MOST_READINGS))

    def columns(self, first: int, count: int, device: torch.device, room: Room) -> HeldPart:
        """The packed values of some outputs and of those after them, (rows, columns) of int32 as they lie on disk."""
        start, stop = self.columns_from(first, count)
        stop = stop if device.type == "cpu" else self.tensors[0].info.shape[1]
        reading, cpu = Room(room.sources, room.host), torch.device("cpu")
        part = self.part(start, stop, device, lambda at, size: reading.read(self.tensors[0], at, size, cpu).numpy())
        return replace(part, values=torch.from_numpy(part.values).to(device))

    def columns_from(self, first: int, count: int) -> tuple[int, int]:
        """The columns of packed values, from that of an output on, that a thread holds on a CPU."""
        rows, width = self.tensors[0].info.shape
        start, stop = first // self.together, -(-(first + count) // self.together)
        return start, min(width, max(stop, start + self.memory // (4 * rows)))

    def groups(self, room: Room) -> Tensor:
        """The group of each input, (inputs,) of int64; none where every `group` inputs in a row are one."""
        return self.in_turns(*(read_whole(tensor, room) for tensor in self.tensors[3:]))

    def in_turns(self, *stored: Tensor) -> Tensor:
        """The same of the groups as stored, if they are."""
        in_order = torch.arange(self.line) // self.group
        groups = stored[0].long() if stored else in_order
        return groups[:0] if self.line % self.group == 0 and torch.equal(groups, in_order) else groups

    def scaled(self, integers: Tensor, grid: Grid) -> Tensor:
        """The values of some outputs, (count, inputs) of float32."""
        parted, scales, zeros = self.parted(integers, grid)
        return difference(parted, zeros, self.bits).mul_(scales).view(integers.shape)

    def parted(self, values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Values of some outputs, (count, inputs), and scales and zero points, all of shapes that fit together."""
        if len(grid.groups):
            zeros = grid.zeros.gather(1, grid.groups.expand(len(values), -1))
            return values, grid.scales.index_select(1, grid.groups), zeros
        return values.view(len(values), -1, self.group), grid.scales[:, :, None], grid.zeros[:, :, None]

    def check(self, room: Room) -> str:
        scales = self.tensors[2]
        if wrong := wrong_scales(scales, room, "not zero"):  # AutoRound writes negative ones
            return wrong
        if len(self.tensors) > 3:
            name, number = self.tensors[3].info.name, scales.info.shape[0]
            groups = integers_of(self.tensors[3], room.sources)
            outside = groups[(groups < 0) | (groups >= number)]
            if len(outside):
                return (
                    f"{printable(name)}: {len(outside)} of {len(groups)} values, such as {int(outside[0])}, are not "
                    f"one of the {number} groups"
                )
        return ""

    def measure(self, values: Tensor) -> Tensor:
        """The smallest and the largest value of each group, 0 being one of each: (lines, groups, 2)."""
        with OpenSources() as sources:
            groups = self.groups(Room(sources)).to(values.device)
        if not len(groups):
            parted = values.view(len(values), -1, self.group)
            low, high = parted.amin(2), parted.amax(2)  # ten times as fast as both at once
            return torch.stack([low.clamp_(max=0), high.clamp_(min=0)], 2)
        groups, size = groups.expand(len(values), -1), (len(values), self.tensors[2].info.shape[0])
        ends = (values.new_zeros(size).scatter_reduce_(1, groups, values, which) for which in ("amin", "amax"))
        return torch.stack([*ends], 2)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Scales and zero points by each group's smallest and largest value, as the quantisers choose them.

        Where all zero points of the base are in the middle, they stay there. A group without a range keeps its scale.
        """
        zeros, scales = (own[tensor.info.name] for tensor in self.tensors[1:3])
        low, high = measured.cpu().float().permute(2, 1, 0)  # (groups, outputs) each
        top, middle = (1 << self.bits) - 1, 1 << self.bits - 1
        symmetric = bool((self.zero_points(zeros) == middle).all())
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        found = ((high - low) / top).to(scales.dtype)
        found = torch.where(found.isfinite() & (found != 0), found, scales)
        parameters = {**own, self.tensors[2].info.name: found}
        if not symmetric:
            points = (-low / found.float()).round_().clamp_(self.least_zero, top).to(torch.uint8)
            parameters[self.tensors[1].info.name] = self.stored_zeros(points)
        return parameters

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        parted, scales, zeros = self.parted(values, self.grid(first, len(values), parameters, values.device))
        integers = (parted / scales).round_().add_(zeros).clamp_(0, (1 << self.bits) - 1).to(torch.uint8)
        return rows_of(self.words(integers.view(values.shape))).view(torch.uint8).flatten()

    def decode_packed(self, packed: Tensor, first: int, count: int, parameters: Mapping[str, Tensor]) -> Tensor:
        words = packed.view(torch.int32).view(-1, self.tensors[0].info.shape[0]).T
        return self.scaled(self.integers(words, 0, count), self.grid(first, count, parameters, packed.device))

    def laid_out(self, packed: Tensor) -> Tensor:
        words = packed.view(torch.int32).view(-1, self.tensors[0].info.shape[0])
        return rows_of(words.T).view(torch.uint8).flatten()

    def grid(self, first: int, count: int, parameters: Mapping[str, Tensor], device: torch.device) -> Grid:
        """The grid of some outputs, of parameters as they are stored."""
        zeros, scales, *order = (parameters[tensor.info.name] for tensor in self.tensors[1:])
        start, stop = first // 32, -(-(first + count) // 32)  # 32 outputs are whole words
        points = self.zero_points(zeros[:, start * self.bits : stop * self.bits]).T[first - 32 * start :][:count]
        parts = scales.T[first : first + count].float(), points, self.in_turns(*order)
        return Grid(*(part.to(device) for part in parts))


def rows_of(matrix: Tensor) -> Tensor:
    """A copy that can be viewed as bytes even where it has one column: `contiguous` leaves that as it is."""
    return matrix.clone(memory_format=torch.contiguous_format)


def difference(integers: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Integers minus their zero points, both of uint8, as float32."""
    if bits < 8:  # int8 holds it, and is a quarter of what float32 would move
        return (integers.view(torch.int8) - zeros.view(torch.int8)).float()
    return integers.float().sub_(zeros)
