"""The tensors that a packed weight is made of: found by name with the dtype and shape they must have, and read.

What all kinds of packed weights share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

from loratool.adapters.adapter import INTEGER_NAMES, StoredTensor
from loratool.bases.weights import WIDENED, Plain, Room, plain_of, widen
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.lazy import NDArray, Tensor, numpy, torch

TOGETHER = 1 << 16  # values that are looked up at a time, in the cache
KEYS = 1 << 16  # upper halves of a float32
TORCH_NAMES = {
    **FLOAT_NAMES,
    **INTEGER_NAMES,
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "uint8",  # powers of two, which stay bytes
}


class Unfit(Exception):  # noqa: N818 (what is wrong is noted, and the search goes on)
    """A packed weight cannot be read; its `Finder` has noted why."""


@dataclass
class Finder:
    """Finds the tensors of a base's packed weights, and collects what is wrong with them."""

    base: Checkpoint
    problems: list[str] = field(default_factory=list)

    def stems(self, ending: str) -> Iterator[str]:
        """What the names of tensors with an ending begin with."""
        return (name.removesuffix(ending) for name in self.base.tensors if name.endswith(ending))

    def part(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None, why: str = "") -> Plain | None:
        """A tensor of one of these dtypes and of this shape (None: any); else None, and a problem is noted."""
        info = self.base.tensors.get(name)
        if info is not None and info.dtype in dtypes and (shape is None or info.shape == tuple(shape)):
            return plain_of(self.base, name)
        wanted = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
        found = f"it is {told(info)}" if info else "it is missing"
        self.note(name, f"must be {wanted}{why and ' '}{why}, but {found}")
        return None

    def need(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None, why: str = "") -> Plain:
        """The same where nothing else can be said without it. Raises `Unfit`."""
        return self.every(self.part(name, dtypes, shape, why))[0]

    def every(self, *parts: Plain | None) -> tuple[Plain, ...]:
        """What `part` has found. Raises `Unfit` where one is missing, once all of them were looked at."""
        found = tuple(part for part in parts if part is not None)
        if len(found) < len(parts):
            raise Unfit
        return found

    def unfit(self, name: str, problem: str) -> Unfit:
        """The exception to raise where something is wrong with a tensor, which is noted."""
        self.note(name, problem)
        return Unfit()

    def note(self, name: str, problem: str) -> None:
        """Something that is wrong with a tensor."""
        self.problems.append(f"{printable(name)}: {problem}")

    def note_both(self, name: str, other: str) -> None:
        """A tensor is plain, and what packed ones have is there as well."""
        found = told(self.base.tensors[name])
        self.note(name, f"is {found}, but {printable(other)} exists too: it must be either plain or packed")

    def refuse(self, title: str, way_out: str) -> None:
        """Raise `InputError` where anything is wrong, with all of it."""
        if self.problems:
            raise InputError(f"{self.base.name}: {title} weights that cannot be read; {way_out}:", self.problems)


def is_count(value: object) -> TypeGuard[int]:
    """Whether something that a file says is a whole number above 0."""
    return type(value) is int and value > 0


def shown(value: object) -> str:
    """A value of a config, for a person."""
    return "missing" if value is None else printable(repr(value))


def told(info: TensorInfo) -> str:
    """Dtype and shape of a tensor, for a person."""
    return f"{info.dtype} {list(info.shape)}"


def read_range(tensor: StoredTensor, start: int, stop: int, device: torch.device, room: Room) -> Tensor:
    """Values `start` … `stop` of a tensor, numbered row by row, in the dtype they have on disk and memory of their own."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.info.dtype])
    size = dtype.itemsize
    return Room(room.sources).read(tensor, start * size, (stop - start) * size, device).view(dtype)


def bytes_of(tensor: StoredTensor, sources: OpenSources) -> bytes:
    """All bytes of a small tensor; torch need not be imported for them."""
    raw = bytearray(tensor.info.nbytes)
    tensor.read(0, memoryview(raw), sources)
    return bytes(raw)


def read_whole(tensor: StoredTensor, room: Room) -> Tensor:
    """All values of a small tensor on the CPU, in the dtype and the shape they have on disk."""
    return read_range(tensor, 0, tensor.info.elements, torch.device("cpu"), room).view(tensor.info.shape)


def held(name: str, device: torch.device, room: Room, make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes on the CPU, worked out once for a weight and kept on `device`, ready on each of its streams."""
    return room.held.of((name, device), lambda: make().to(device))


def wrong_scales(tensor: StoredTensor, room: Room, sign: str = "any") -> str:
    """What is wrong with scales, as a quantiser writes none: values that are not finite, or of another sign.

    `sign` is "any", "not zero", "not negative" or "positive". Empty where nothing is wrong.
    """
    values = floats_of(tensor, room.sources)
    wrong = {"NaN or infinite": ~numpy.isfinite(values)}
    wrong |= {"negative": values < 0} if sign in ("not negative", "positive") else {}
    wrong |= {"zero": values == 0} if sign in ("not zero", "positive") else {}
    counts = {kind: int(which.sum()) for kind, which in wrong.items()}
    found = [f"{count} of {values.size} values are {kind}" for kind, count in counts.items() if count]
    return f"{printable(tensor.info.name)}: {', '.join(found)}" if found else ""


def floats_of(tensor: StoredTensor, sources: OpenSources) -> NDArray[Any]:
    """All values of a small tensor, (n,) of float32; without torch where numpy has the dtype."""
    if tensor.info.dtype not in WIDENED:
        found: NDArray[Any] = read_whole(tensor, Room(sources)).float().flatten().numpy()
        return found
    values = numpy.empty(tensor.info.elements, numpy.float32)
    widen(values, numpy.frombuffer(bytes_of(tensor, sources), numpy.uint8), tensor.info.dtype)
    return values


def integers_of(tensor: StoredTensor, sources: OpenSources) -> NDArray[Any]:
    """All values of a small tensor of int32 or int64, in its shape."""
    dtype = {"I32": numpy.int32, "I64": numpy.int64}[tensor.info.dtype]
    return numpy.frombuffer(bytes_of(tensor, sources), dtype).reshape(tensor.info.shape)


def in_blocks(values: Tensor, start: int, block: int) -> Iterator[tuple[Tensor, slice]]:
    """Some values, the first of which is number `start`, as matrices of whole or cut blocks, a row for each block.

    With each matrix comes the slice of its blocks, counted from the block that has the first value.
    """
    head, number = min(-start % block, values.numel()), 0
    if head:
        yield values[:head].view(1, -1), slice(0, number := 1)
    whole = (values.numel() - head) // block
    if whole:
        yield values[head : head + whole * block].view(-1, block), slice(number, number + whole)
    if head + whole * block < values.numel():
        yield values[head + whole * block :].view(1, -1), slice(number + whole, number + whole + 1)


def in_turns(values: Tensor, start: int, groups: int) -> Iterator[tuple[Tensor, slice]]:
    """Some values, the first of which is number `start`, as matrices whose columns are groups: value i is of i % groups.

    With each matrix comes the slice of its groups.
    """
    for part, _ in in_blocks(values, start, groups):
        first = start % groups
        yield part, slice(first, first + part.shape[1])
        start += part.numel()


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Values → the number of the entry of `table`, (n,) in any order, that is nearest, as uint8; of NaN, that of 0."""
    flat = values.flatten()
    order, middles = sorted_entries(table)
    steps = steps_of(tuple(table.tolist()), table.device) if flat.numel() >= KEYS else None
    found = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    size = TOGETHER if flat.device.type == "cpu" else max(1, flat.numel())
    for some, into in zip(torch.split(flat, size), torch.split(found, size), strict=True):
        finite = some.nan_to_num(0.0)
        if steps is None:
            into.copy_(torch.bucketize(finite, middles, out_int32=True))
        else:
            at = finite.view(torch.int32).bitwise_right_shift(16).add_(KEYS // 2)
            torch.index_select(steps.below, 0, at, out=into)
            into.add_((finite > steps.edges.index_select(0, at)).view(torch.uint8))
    if steps is None or not steps.in_order:
        found = order.index_select(0, found.int())
    return found.view(values.shape)


def sorted_entries(table: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of a table's entries as uint8, the smallest entry first, and what lies midway between them."""
    order = table.argsort()
    between = table[order].double()
    return order.to(torch.uint8), ((between[1:] + between[:-1]) / 2).float()


class Steps(NamedTuple):
    """For each upper half of a float32, (65536,) each: at most one edge that is there between two entries of a table."""

    edges: Tensor  # float32; infinite where there is none
    below: Tensor  # uint8, how many entries are smaller than those of numbers that are not above the edge
    in_order: bool  # whether the table is sorted


@lru_cache(8)
def steps_of(entries: tuple[float, ...], device: torch.device) -> Steps | None:
    """How the entries of a table are found by the upper half of a number; None where two edges are in one such half."""
    order, middles = sorted_entries(torch.tensor(entries))
    halves = torch.arange(-KEYS // 2, KEYS // 2, dtype=torch.int32) << 16
    ends = torch.stack([halves, halves | 0xFFFF]).view(torch.float32)
    ends = torch.where(ends.isfinite().all(0), ends, 0.0)  # others do not come
    low, high = torch.bucketize(ends, middles).aminmax(dim=0)  # of negative numbers the first half is the higher end
    if bool((high - low > 1).any()):
        return None
    edges = torch.cat([middles, middles.new_full((1,), math.inf)])[low]
    in_order = bool((order == torch.arange(len(order))).all())
    return Steps(edges.to(device), low.to(torch.uint8).to(device), in_order)


def largest_in_blocks(values: Tensor, block: int) -> Tensor:
    """The largest magnitude in each block of so many values, numbered row by row, (blocks,); the last may be cut."""
    return torch.cat([part.abs().amax(1) for part, _ in in_blocks(values.flatten(), 0, block)])
