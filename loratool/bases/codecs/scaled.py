"""Weights that are small numbers times scales: what FP8, compressed-tensors, ModelOpt and gpt-oss have in common.

Formats differ in how numbers lie in bytes (`Numbers`), in the block of values that shares a scale, and in what else there
is: a zero point for each block, a scale of the whole matrix, or scales of columns. In float32, an operation at a time:

    W = (number − zero) · (scale, divided by or times that of the whole matrix) · scale of the column
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loratool.adapters.adapter import StoredTensor
from loratool.bases.codecs.bit_fields import unpacked
from loratool.bases.codecs.byte_values import OFFSET_INT4, bit_fields, e4m3, e8m0, nibbles
from loratool.bases.codecs.parts import held, read_whole, wrong_scales
from loratool.bases.packed import Packed
from loratool.bases.weights import Room
from loratool.errors import printable
from loratool.files.safefile import DTYPE_BITS
from loratool.lazy import Tensor, torch

POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two
SCALES = ("F32", "BF16", "F16")  # dtypes of other scales


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a line lie in its bytes."""

    title: str  # such as "int4"
    floats: Callable[[Tensor], Tensor]  # (lines, bytes) of uint8 → (lines, numbers) of float32, perhaps some more
    paired: bool = False  # a byte holds numbers of two lines, the low nibble that of the first, not of two columns


@dataclass(frozen=True, kw_only=True)
class Scaled(Packed):
    """A matrix of numbers, or a stack of matrices, whose blocks have scales.

    Of a matrix of (rows, line) values, scales are (⌈rows/b⌉, ⌈line/c⌉), b and c the sides of a block; blocks at the edges
    may be cut. `tensors` are all that make up the weight, the numbers first.
    """

    numbers: Numbers
    height: int  # rows of one matrix
    block: tuple[int, int]  # rows, columns
    scales: StoredTensor
    whole: StoredTensor | None = None  # one scale for each matrix
    divides: bool = False  # scales are divided by that of the whole matrix, not multiplied
    zeros: StoredTensor | None = None  # int8, an entry for each block; or int32, in which they are packed along rows
    columns: StoredTensor | None = None  # (line,): a scale for each column
    groups: StoredTensor | None = None  # (line,) of int32: the column of `scales` that a column goes with
    values_shape: StoredTensor | None = None  # int64: the shape of the values, told again
    zero_bits: int = 0  # of zeros in int32

    def decode(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        decoded = self.read_numbers(first, count, device, room)
        groups = self.group_index(device, room)
        if self.zeros is not None:
            self.by_block(decoded, self.read_zeros(first, count, device, room), groups, torch.Tensor.sub_)
        self.by_block(decoded, self.read_scales(first, count, device, room), groups, torch.Tensor.mul_)
        if self.columns is not None:
            decoded.mul_(self.small(self.columns, device, room))
        return decoded

    def read_numbers(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """(count, line) of float32."""
        values, pair = self.tensors[0], 2 if self.numbers.paired else 1
        lines = math.prod(self.shape) // self.line // pair
        width = values.info.nbytes // lines
        top, bottom = first // pair, -(-(first + count) // pair)
        raw = room.read(values, top * width, (bottom - top) * width, device)
        found = self.numbers.floats(raw.view(-1, width))
        if self.numbers.paired:
            found = found.view(-1, width, 2).transpose(1, 2).contiguous().view(-1, width)[first - top * pair :][:count]
        return found if found.shape[1] == self.line else found[:, : self.line].contiguous()

    def read_scales(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """(count, blocks of a line) of float32."""
        found = self.read_entries(self.scales, first, count, device, room)
        if self.whole is None:
            return found
        whole = self.small(self.whole, device, room)
        each = (
            whole[torch.arange(first, first + count, device=device) // self.height, None] if len(whole) > 1 else whole
        )
        return found.div_(each) if self.divides else found.mul_(each)

    def read_entries(self, tensor: StoredTensor, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """Of a tensor with an entry for each block, those of some lines: (count, blocks of a line) of float32."""
        tall, across = self.block[0], -(-self.line // self.block[1])
        down = -(-self.height // tall)
        lines = torch.arange(first, first + count, device=device)
        top = self.row_of_blocks(first, down)
        stop = self.row_of_blocks(first + count - 1, down) + 1
        size = across * DTYPE_BITS[tensor.info.dtype] // 8
        raw = Room(room.sources).read(tensor, top * size, (stop - top) * size, device)
        entries = as_float32(raw, tensor.info.dtype).view(stop - top, across)
        if tall == 1:
            return entries
        return entries[lines // self.height * down + lines % self.height // tall - top]

    def row_of_blocks(self, line: int, down: int) -> int:
        """The row of the scales that goes with a line; each matrix has `down` of them."""
        return line // self.height * down + line % self.height // self.block[0]

    def read_zeros(self, first: int, count: int, device: torch.device, room: Room) -> Tensor:
        """(count, blocks of a line) of float32."""
        assert self.zeros is not None
        if not self.zero_bits:
            return self.read_entries(self.zeros, first, count, device, room)
        across, words = -(-self.line // self.block[1]), -(-self.height * self.zero_bits // 32)  # of a matrix
        found = []
        for matrix, start, stop in self.within_matrices(first, count):
            top, bottom = start // 32 * self.zero_bits, min(-(-stop // 32) * self.zero_bits, words)
            size = 4 * across
            raw = Room(room.sources).read(self.zeros, (matrix * words + top) * size, (bottom - top) * size, device)
            turned = raw.view(torch.int32).view(-1, across).T.contiguous().view(-1).view(torch.uint8).view(across, -1)
            found.append(offset_integers(turned, self.zero_bits)[:, start % 32 :][:, : stop - start].T)
        return found[0] if len(found) == 1 else torch.cat(found)

    def within_matrices(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Some lines as lines of matrices: number of the matrix, first line, and the one after the last."""
        for matrix in range(first // self.height, (first + count - 1) // self.height + 1):
            begin = matrix * self.height
            yield matrix, max(first - begin, 0), min(first + count - begin, self.height)

    def group_index(self, device: torch.device, room: Room) -> Tensor | None:
        """The column of scales for each column, where that is not in order. Older files fill it with −1: in order."""
        if (groups := self.groups) is None:
            return None

        def read() -> Tensor | None:
            index = read_whole(groups, room)
            return None if bool((index < 0).all()) else index.to(device)

        return room.held.of(("groups", device), read)

    def by_block(
        self, decoded: Tensor, entries: Tensor, groups: Tensor | None, change: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Change values in place, each by the entry of its block."""
        width = self.block[1]
        if groups is not None:
            change(decoded, entries.index_select(1, groups))
        elif width == 1 or entries.shape[1] == 1:
            change(decoded, entries)
        else:
            whole = self.line // width
            change(decoded[:, : whole * width].view(len(decoded), whole, width), entries[:, :whole, None])
            if whole * width < self.line:
                change(decoded[:, whole * width :], entries[:, whole:])

    def small(self, tensor: StoredTensor, device: torch.device, room: Room) -> Tensor:
        """The values of a small tensor as (n,) of float32, read once."""
        return held(tensor.info.name, device, room, lambda: read_whole(tensor, room).float().flatten())

    def check(self, room: Room) -> str:
        scales = [each for each in (self.scales, self.whole, self.columns) if each is not None]
        return next(filter(None, (wrong(each, room) for each in scales)), "") or self.wrong_indices(room)

    def wrong_indices(self, room: Room) -> str:
        """What is wrong with the index of groups, or with the shape that is told again. Empty where nothing is."""
        if self.groups is not None:
            index, blocks = read_whole(self.groups, room), -(-self.line // self.block[1])
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


def as_float32(raw: Tensor, dtype: str) -> Tensor:
    """Values of a tensor that lies in a file as (bytes,), as (n,) of float32 in memory of their own."""
    if dtype in POWERS:
        return e8m0(raw)
    if dtype == "F8_E4M3":
        return e4m3(raw)
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}[dtype]
    return raw.view(stored).to(torch.float32, copy=True)


def offset_integers(packed: Tensor, bits: int) -> Tensor:
    """(n, bytes) of uint8 → (n, integers) of float32: unsigned ones that lie one after the other, less 2^(bits − 1)."""
    if bits == 4:
        return nibbles(packed, OFFSET_INT4)
    if bits == 8:
        return packed.bitwise_xor(128).view(torch.int8).float()
    fields = unpacked(packed, bits) if bits < 4 and packed.shape[1] % bits == 0 else bit_fields(packed, bits)
    return fields.float().sub_(1 << bits - 1)


def fits(found: tuple[int, ...], matrices: tuple[int, ...], rows: int, line: int, block: tuple[int, int]) -> bool:
    """Whether a tensor of this shape has an entry for each block of a stack of matrices; ones may be left out or put in."""
    wanted = (*matrices, -(-rows // block[0]), -(-line // block[1]))
    return found == wanted or (len(found) != len(wanted) and without_ones(found) == without_ones(wanted))


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def scheme_of(title: str, block: tuple[int, int], rows: int, line: int) -> str:
    """What a person calls it: `int4, groups of 32`."""
    match block:
        case (1, across) if across == line:
            return f"{title}, one scale per row"
        case (1, across):
            return f"{title}, groups of {across}"
        case (down, across) if (down, across) == (rows, line):
            return f"{title}, one scale"
        case (down, 1) if down == rows:
            return f"{title}, one scale per column"
        case (down, across):
            return f"{title}, blocks of {down} x {across}"
