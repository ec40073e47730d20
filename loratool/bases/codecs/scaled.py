"""Weights that are small numbers times scales: what FP8, compressed-tensors and ModelOpt have in common.

Formats differ in how numbers lie in bytes (`Numbers`), in the block of values that shares a scale, and in what else there
is: a zero point for each block, a scale of the whole matrix, or scales of columns. In float32, an operation at a time:

    W = (number − zero) · (scale, divided by or times that of the whole matrix) · scale of the column

The other way, a number is the nearest one to W / scale of the column / scale + zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs import new_scales, numpy_values
from loratool.bases.codecs.byte_values import by_rows
from loratool.bases.codecs.numbers import FP8, Numbers, offset_floats
from loratool.bases.codecs.parameters import POWERS, InMemory, LineByLine, Parameters, as_float32
from loratool.bases.codecs.parts import floats_of, read_whole, wrong_scales
from loratool.bases.weights import WIDENED, Memory, Room
from loratool.errors import printable
from loratool.lazy import NDArray, Tensor, torch

Block = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Tiles:
    """A matrix, or a stack of matrices, in blocks that have a scale each; blocks at the edges may be cut."""

    stack: tuple[int, ...]  # matrices; none for a matrix alone
    rows: int  # of one matrix
    line: int
    block: Block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return (*self.stack, self.rows, self.line)

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of a tensor with an entry for each block."""
        return (*self.stack, -(-self.rows // self.block[0]), -(-self.line // self.block[1]))

    def fits(self, found: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has an entry for each block; ones may be left out or put in."""
        return found == self.grid or (len(found) != len(self.grid) and without_ones(found) == without_ones(self.grid))

    def scheme(self, title: str) -> str:
        """What a person calls it: `int4, groups of 32`."""
        match self.block:
            case (1, across) if across == self.line:
                return f"{title}, one scale per row"
            case (1, across):
                return f"{title}, groups of {across}"
            case block if block == (self.rows, self.line):
                return f"{title}, one scale"
            case (down, 1) if down == self.rows:
                return f"{title}, one scale per column"
            case (down, across):
                return f"{title}, blocks of {down} x {across}"


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True, kw_only=True)
class Scaled(LineByLine):
    """A matrix of numbers, or a stack of matrices, whose blocks have scales.

    Of a matrix of (rows, line) values, scales are (⌈rows/b⌉, ⌈line/c⌉), b and c the sides of a block; blocks at the edges
    may be cut. `tensors` are all that make up the weight, the numbers first.
    """

    numbers: Numbers
    tiles: Tiles
    scales: StoredTensor
    whole: StoredTensor | None = None  # one scale for each matrix
    divides: bool = False  # scales are divided by that of the whole matrix, not multiplied
    zeros: StoredTensor | None = None  # int8, an entry for each block; or int32, in which they are packed along rows
    columns: StoredTensor | None = None  # (line,): a scale for each column
    groups: StoredTensor | None = None  # (line,) of int32: the column of `scales` that a column goes with
    values_shape: StoredTensor | None = None  # int64: the shape of the values, told again
    zero_bits: int = 0  # of zeros in int32

    def span(self, first: int, count: int) -> tuple[int, int]:
        width = self.tensors[0].info.nbytes // (math.prod(self.shape) // self.line // self.together)
        top, bottom = first // self.together, -(-(first + count) // self.together)
        return top * width, (bottom - top) * width

    def scaled(self, raw: Tensor, first: int, count: int, parameters: Parameters) -> Tensor:
        decoded = self.read_numbers(raw, first, count)
        groups = self.group_index(parameters)
        if self.zeros is not None:
            self.by_block(decoded, self.read_zeros(first, count, parameters), groups, torch.Tensor.sub_)
        self.by_block(decoded, self.read_scales(first, count, parameters), groups, torch.Tensor.mul_)
        if self.columns is not None:
            decoded.mul_(small(self.columns, parameters))
        return decoded

    @property
    def by_numpy(self) -> bool:
        others = (self.whole, self.zeros, self.columns, self.groups, self.values_shape)
        return self.numbers is FP8 and others == (None,) * 5 and self.scales.info.dtype in WIDENED

    def decode_into(self, values: NDArray[Any], first: int, memory: Memory) -> None:
        scales = memory.held.of("scales by numpy", lambda: floats_of(self.scales, memory.sources))
        numpy_values.e4m3(values.reshape(-1), memory.read(self.tensors[0], first * self.line, values.size))
        blocks = [self.row_of_blocks(line) for line in range(first, first + len(values))]
        numpy_values.multiply(
            values, scales.reshape(-1, self.tiles.grid[-1])[blocks], min(self.tiles.block[1], self.line)
        )

    def read_numbers(self, raw: Tensor, first: int, count: int) -> Tensor:
        """(count, line) of float32."""
        top, bottom = first // self.together, -(-(first + count) // self.together)
        found = self.numbers.floats(raw.view(bottom - top, -1))
        if self.numbers.paired:
            lines = found.view(bottom - top, self.line, 2).transpose(1, 2).contiguous().view(-1, self.line)
            return lines[first - top * 2 :][:count]
        return found if found.shape[1] == self.line else found[:, : self.line].contiguous()

    def read_scales(self, first: int, count: int, parameters: Parameters) -> Tensor:
        """(count, blocks across) of float32."""
        found = self.read_entries(self.scales, first, count, parameters)
        if self.whole is None:
            return found
        each = small(self.whole, parameters)
        if len(each) > 1:
            each = each[torch.arange(first, first + count, device=each.device) // self.tiles.rows, None]
        return found.div_(each) if self.divides else found.mul_(each)

    def read_entries(self, tensor: StoredTensor, first: int, count: int, parameters: Parameters) -> Tensor:
        """Of a tensor with an entry for each block, those of some lines: (count, blocks across) of float32."""
        top, bottom = self.row_of_blocks(first), self.row_of_blocks(first + count - 1) + 1
        entries = as_float32(parameters.some(tensor, top * self.tiles.grid[-1], bottom * self.tiles.grid[-1])).view(
            bottom - top, -1
        )
        if self.tiles.block[0] == 1:
            return entries
        lines = torch.arange(first, first + count, device=entries.device)
        return entries[
            lines // self.tiles.rows * self.tiles.grid[-2] + lines % self.tiles.rows // self.tiles.block[0] - top
        ]

    def row_of_blocks(self, line: int) -> int:
        """The row of blocks that a line is in, over all matrices."""
        return line // self.tiles.rows * self.tiles.grid[-2] + line % self.tiles.rows // self.tiles.block[0]

    def read_zeros(self, first: int, count: int, parameters: Parameters) -> Tensor:
        """(count, blocks across) of float32."""
        assert self.zeros is not None
        if not self.zero_bits:
            return self.read_entries(self.zeros, first, count, parameters)
        across, words = self.tiles.grid[-1], -(-self.tiles.rows * self.zero_bits // 32)  # of a matrix
        found = []
        for matrix, start, stop in self.within_matrices(first, count):
            top, bottom = start // 32 * self.zero_bits, min(-(-stop // 32) * self.zero_bits, words)
            some = parameters.some(self.zeros, (matrix * words + top) * across, (matrix * words + bottom) * across)
            turned = some.view(-1, across).T.contiguous().view(-1).view(torch.uint8).view(across, -1)
            found.append(offset_floats(turned, self.zero_bits)[:, start % 32 :][:, : stop - start].T)
        return found[0] if len(found) == 1 else torch.cat(found)

    def within_matrices(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Some lines as lines of matrices: number of the matrix, first line, and the one after the last."""
        for matrix in range(first // self.tiles.rows, (first + count - 1) // self.tiles.rows + 1):
            begin = matrix * self.tiles.rows
            yield matrix, max(first - begin, 0), min(first + count - begin, self.tiles.rows)

    def group_index(self, parameters: Parameters) -> Tensor | None:
        """The column of scales for each column, where a tensor tells it. Older files fill it with −1: in order."""
        if self.groups is None:
            return None

        def made(index: Tensor) -> Tensor:
            in_order = torch.arange(self.line, dtype=torch.int32, device=index.device) // self.tiles.block[1]
            return torch.where((index < 0).all(), in_order, index)

        return parameters.kept(self.groups, made)

    def by_block(
        self, values: Tensor, entries: Tensor, groups: Tensor | None, change: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Change values in place, each by the entry of its block."""
        width = self.tiles.block[1]
        if groups is not None:
            change(values, entries.index_select(1, groups))
        elif width == 1 or entries.shape[1] == 1:
            change(values, entries)
        else:
            whole = self.line // width
            change(values[:, : whole * width].view(len(values), whole, width), entries[:, :whole, None])
            if whole * width < self.line:
                change(values[:, whole * width :], entries[:, whole:])

    @property
    def together(self) -> int:
        return 2 if self.numbers.paired else 1

    def measure(self, values: Tensor) -> Tensor:
        """The largest magnitude of each block, as far as it is in a line: (lines, blocks across).

        With zero points, those of the negative values and, beside them, those of the others.
        """
        if self.columns is not None:
            values = values / self.columns.load(values.device, torch.float32)
        if self.zeros is None:
            return self.largest(values.abs())
        return torch.cat([self.largest(values.clamp_max(0).abs()), self.largest(values.clamp_min(0))], 1)

    def largest(self, magnitudes: Tensor) -> Tensor:
        """That of each block of a line."""
        across, width = self.tiles.grid[-1], self.tiles.block[1]
        index = None if self.groups is None else self.groups.load(magnitudes.device, torch.float32).long()
        if index is not None and int(index.min()) >= 0:
            found = magnitudes.new_zeros(len(magnitudes), across)
            return found.scatter_reduce_(1, index.expand(len(magnitudes), -1), magnitudes, "amax")
        padded = torch.nn.functional.pad(magnitudes, (0, across * width - self.line))
        return padded.view(len(magnitudes), across, width).amax(2)

    def new_parameters(self, measured: Tensor, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Scales for the largest magnitudes; that of a whole matrix stays where those of its blocks fit beside it."""
        down, across = self.tiles.grid[-2:]
        lines = measured.cpu().view(-1, self.tiles.rows, measured.shape[1])
        lines = torch.nn.functional.pad(lines, (0, 0, 0, down * self.tiles.block[0] - self.tiles.rows))
        blocks = lines.view(len(lines), down, self.tiles.block[0], -1).amax(2)
        below, above = blocks[..., :across], blocks[..., -across:]
        largest = torch.maximum(below, above)
        wanted = (largest if self.zeros is None else (below + above) / 2) / self.numbers.span
        changed: dict[str, Tensor] = {}
        if self.whole is not None:
            before = own[self.whole.info.name]
            second = new_scales.new_second(before.flatten(), largest.amax((1, 2)), self.numbers, self.divides)
            changed[self.whole.info.name] = second.view(before.shape)
            wanted = wanted * second.view(-1, 1, 1) if self.divides else wanted / second.view(-1, 1, 1)
        before = own[self.scales.info.name]
        if self.scales.info.dtype in POWERS:
            scales = new_scales.stored_powers(largest, self.numbers)
        else:
            scales = new_scales.stored_scales(wanted, before.dtype)
        changed[self.scales.info.name] = scales.view(before.shape)
        if self.zeros is not None:
            zeros = new_scales.zero_points(-below, scales.float(), self.numbers)
            packed = new_scales.packed_zeros(zeros, self.zero_bits) if self.zero_bits else zeros.to(torch.int8)
            changed[self.zeros.info.name] = packed.view(self.zeros.info.shape)
        return {**own, **changed}

    def encode(self, values: Tensor, first: int, parameters: Mapping[str, Tensor]) -> Tensor:
        own = InMemory(values.device, parameters)
        groups, count = self.group_index(own), len(values)
        units = values / small(self.columns, own) if self.columns is not None else values.clone()
        self.by_block(units, self.read_scales(first, count, own), groups, torch.Tensor.div_)
        if self.zeros is not None:
            self.by_block(units, self.read_zeros(first, count, own), groups, torch.Tensor.add_)
        packed = self.numbers.bytes(self.numbers.clamped(units))
        return (by_rows(packed)[:, : self.line] if self.numbers.paired else packed).flatten()

    def check(self, room: Room) -> str:
        scales = [each for each in (self.scales, self.whole, self.columns) if each is not None]
        return next(filter(None, (wrong(each, room) for each in scales)), "") or self.wrong_indices(room)

    def wrong_indices(self, room: Room) -> str:
        """What is wrong with the index of groups, or with the shape that is told again. Empty where nothing is."""
        if self.groups is not None:
            index, blocks = read_whole(self.groups, room), -(-self.line // self.tiles.block[1])
            unset = bool((index == -1).all())
            if not unset and not bool(((index >= 0) & (index < blocks)).all()):
                return (
                    f"{printable(self.groups.info.name)}: values must be from 0 to {blocks - 1}, "
                    f"but they are from {int(index.min())} to {int(index.max())}"
                )
        if self.values_shape is not None:
            told = tuple(read_whole(self.values_shape, room).tolist())
            here = (*self.tensors[0].info.shape[:-1], self.line)
            if told != here:
                name = printable(self.values_shape.info.name)
                return f"{name}: it says {list(told)}, but the packed values and their scales make {list(here)}"
        return ""


def wrong(scales: StoredTensor, room: Room) -> str:
    """What is wrong with the values of scales. Empty where nothing is."""
    if scales.info.dtype not in POWERS:
        return wrong_scales(scales, room, "positive")
    count = int((Room(room.sources).read(scales, 0, scales.info.nbytes, torch.device("cpu")) == 255).sum())
    return f"{printable(scales.info.name)}: {count} of {scales.info.elements} values are NaN" if count else ""


def small(tensor: StoredTensor, parameters: Parameters) -> Tensor:
    """The values of a small tensor, as (n,) of float32."""
    return parameters.kept(tensor, lambda values: as_float32(values).flatten())
