"""What every update has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from loratool.lazy import Tensor, torch

ANY = -1  # a size that the weight decides


class WeightRows(Protocol):
    """The rows of the unmerged weight, which are read anew at every call."""

    def __call__(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Some of the rows, by default all, as (first row, block of rows)."""


class Update:
    """A change to one weight, which is seen as a matrix: its first `fold` dimensions together are the rows.

    `delta` is the definition. `add_rows` is the same change made in place on some of the rows, and the
    only way the engine takes. A property test holds the two together for every kind.
    """

    fold: ClassVar[int] = 1
    looks_at_base: ClassVar[bool] = False  # `add_rows` wants the unmerged rows as well
    replaces: ClassVar[bool] = False  # puts saved values in the weight's place, so that others build on them
    depends_on_weight: ClassVar[bool] = False  # ΔW is another one for another W, and no negative strength takes it out
    adds_products: ClassVar[bool] = (
        False  # ΔW is the sum of its `products`, which can be added exactly and rounded once
    )

    @property
    def needs_weight(self) -> bool:
        """Whether `prepared` must be called before `add_rows`."""
        return False

    @property
    def turnable(self) -> bool:
        """Whether this is for a linear layer, whose weight may be stored (in, out) as well as (out, in)."""
        return False

    @property
    def turned(self) -> Update:
        """The same update for the weight stored the other way round; only where it is `turnable`."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this fits, as it is stored; `ANY` for a size that the weight decides."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Columns of factors, which take (rows + columns) · rank elements of memory; 0 where there are none such."""
        return 0

    def fit(self, shape: tuple[int, ...]) -> Update | None:
        """Make the update fit a weight stored in `shape`; None where it cannot.

        What acts on a matrix also fits a weight of more dimensions, such as a convolution's, as (rows, all else).
        """
        return self if agree(self.shape, shape) else None

    def prepared(self, weight: WeightRows) -> Update:  # noqa: ARG002
        """The same update with all that it must know of the unmerged weight. Its tensors are loaded already."""
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """The change to `weight` (of the fitted shape, float32 or float64), at strength 1, in its dtype."""
        raise NotImplementedError

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        """Change `rows` in place: a (n, columns) block that begins at row `first_row`.

        `rows` may have been changed by other updates; `base` is the block before any of them (the same
        tensor where `looks_at_base` is false).
        """
        raise NotImplementedError

    def norm(self) -> float:
        """Frobenius norm of the change at strength 1; infinite where that depends on the weight."""
        return math.inf

    def products(self, columns: int) -> tuple[Product, ...]:
        """What ΔW is the sum of at strength 1, for a weight of so many columns; only where it `adds_products`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Product:
    """scale · up @ down, which goes to the rows from `first` on; `up` itself, scaled, where there is no `down`."""

    first: int
    up: Tensor  # (rows, rank)
    down: Tensor | None  # (rank, columns)
    scale: float


@dataclass(frozen=True, kw_only=True)
class Oriented(Update):
    """A change that is known for a weight stored (out, in), to a linear layer's that may be stored the other way."""

    in_out: bool = False  # how the weight is stored
    turnable: bool = True

    @property
    def turned(self) -> Update:
        return replace(self, in_out=not self.in_out)


@dataclass(frozen=True, kw_only=True)
class Sized(Oriented):
    """One whose factors do not tell the shape of the weight, which `fit` puts in."""

    size: tuple[int, ...] = (ANY, ANY)  # of the weight, once fitted

    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def turned(self) -> Update:
        return replace(self, in_out=not self.in_out, size=self.size[::-1])


@dataclass(frozen=True)
class Wrapped(Update):
    """A change that another one is part of, and that fits the same weights."""

    inner: Update

    @property
    def turnable(self) -> bool:
        return self.inner.turnable

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int:
        return self.inner.rank


def whole(weight: WeightRows) -> Tensor:
    """All rows of a weight."""
    return torch.cat([block for _, block in weight()])


def passed(first_row: int, rows: int, each: int) -> Iterator[tuple[int, int, slice]]:
    """The parts, `each` rows high, that a block of rows goes through: number, first row within it, and rows of the block."""
    at = 0
    while at < rows:
        number, within = divmod(first_row + at, each)
        count = min(each - within, rows - at)
        yield number, within, slice(at, at + count)
        at += count


def agree(wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a weight of `shape` is what an update of shape `wanted` is for.

    What has a kernel of 1 also fits a matrix, as some releases of a model have one where others have a convolution.
    """
    if len(shape) == 2 and wanted[2:] and set(wanted[2:]) <= {1, ANY}:
        wanted = wanted[:2]
    seen = (shape[0], math.prod(shape[1:])) if len(wanted) == 2 < len(shape) else shape
    return len(wanted) == len(seen) and all(size in (ANY, given) for size, given in zip(wanted, seen, strict=True))
