"""Rows of stored factors in another order, or some of them: for layouts that fuse or permute what others keep apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Derived, StoredTensor, derived
from loratool.lazy import Tensor

if TYPE_CHECKING:
    from loratool.adapters.model_settings import Heads


def part_of(stored: StoredTensor | Derived, first: int, count: int) -> Any:
    """Entries `first` … `first + count` of the first dimension, as a tensor of its own; it is not transposed."""
    if isinstance(stored, Derived):
        return of_rows(count, stored, Rows(first, count))
    info = stored.info
    size = info.nbytes // max(info.rows, 1)
    start = info.start + first * size
    name = f"{info.name}[{first}:{first + count}]"
    shape = (count, *info.shape[1:])
    return StoredTensor(stored.file, replace(info, name=name, shape=shape, start=start, stop=start + count * size))


def entry_of(stored: StoredTensor, at: int) -> StoredTensor:
    """One entry of the first dimension, without that dimension."""
    part = part_of(stored, at, 1)
    return StoredTensor(part.file, replace(part.info, name=f"{stored.info.name}[{at}]", shape=stored.info.shape[1:]))


def of_rows(rows: int, stored: StoredTensor | Derived, formula: Callable[[Tensor], Tensor]) -> Any:
    """A factor, or lengths, of so many rows that `formula` makes of the stored one when it is loaded."""
    return derived((rows, *stored.shape[1:]), formula, stored)


@dataclass(frozen=True)
class Rows:
    """Some of the rows."""

    first: int
    count: int

    def __call__(self, rows: Tensor) -> Tensor:
        return rows[self.first : self.first + self.count]


@dataclass(frozen=True)
class FromPairs:
    """Rows of each head from interleaved rotary positions (Meta's) to those of halves (transformers').

    Row 2i + h of a head becomes row i + h · width / 2.
    """

    heads: int

    def __call__(self, rows: Tensor) -> Tensor:
        pairs = rows.reshape(self.heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class OfGroups:
    """The rows of queries (part 0), keys (1) or values (2), where they lie group by group.

    A group is its heads of queries, a head of keys, and one of values, all equally wide.
    """

    heads: Heads
    part: int

    def __call__(self, rows: Tensor) -> Tensor:
        each = self.heads.each
        groups = rows.reshape(self.heads.keys, each + 2, -1, *rows.shape[1:])
        chosen = groups[:, :each] if self.part == 0 else groups[:, each + self.part - 1]
        return chosen.reshape(-1, *rows.shape[1:])


@dataclass(frozen=True)
class InParts:
    """B of several parts, one below the other, as the B of the matrix that holds them and some more.

    (enabled · rows, rank) becomes (parts · rows, enabled · rank): each block at the rows of its part and at the
    columns of its own A, all else zero.
    """

    enabled: tuple[bool, ...]

    def __call__(self, b: Tensor) -> Tensor:
        blocks = iter(b.chunk(sum(self.enabled)))
        rows, rank = b.shape[0] // sum(self.enabled), b.shape[1]
        whole = b.new_zeros(len(self.enabled) * rows, sum(self.enabled) * rank)
        for at, part in enumerate(part for part, on in enumerate(self.enabled) if on):
            whole[part * rows : (part + 1) * rows, at * rank : (at + 1) * rank] = next(blocks)
        return whole


@dataclass(frozen=True)
class JoinedRows:
    """Each `count` rows as one: (n · count, columns) becomes (n, count · columns)."""

    count: int

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.reshape(rows.shape[0] // self.count, -1)


@dataclass(frozen=True)
class Repeated:
    """A matrix `count` times on the diagonal of a larger one."""

    count: int

    def __call__(self, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        whole = matrix.new_zeros(self.count * rows, self.count * columns)
        for at in range(self.count):
            whole[at * rows : (at + 1) * rows, at * columns : (at + 1) * columns] = matrix
        return whole
