"""An update of a weight whose rows are stored in another order than the model that was trained has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from loratool.algebra.updates.base import Product, Update, WeightRows, Wrapped, whole
from loratool.lazy import NDArray, Tensor, numpy, torch


@dataclass(frozen=True)
class RowOrder:
    """Where stored rows are in the model.

    In the model they are those of `groups` one after the other, each of which has parts of so many heads; stored, all
    first parts come first, then all second ones. Without parts, each group is a head whose halves, which rotate
    together, are stored in turns, as `(groups, 2, half)` turned into `(groups, half, 2)`.
    """

    groups: int
    parts: tuple[int, ...] = ()  # heads

    def fits(self, rows: int) -> bool:
        """Whether so many rows can be ordered so."""
        return self.groups > 0 and rows % (self.groups * (sum(self.parts) or 2)) == 0

    def numbers(self, rows: int) -> NDArray[numpy.int64]:
        """(rows,): for each stored row its number in the model."""
        numbers = numpy.arange(rows).reshape(self.groups, sum(self.parts) or 2, -1)
        ends = [*accumulate(self.parts)][:-1]
        split = numpy.split(numbers, ends, axis=1) if self.parts else [numbers.transpose(0, 2, 1)]
        return numpy.concatenate([part.reshape(-1) for part in split])

    def of(self, rows: int) -> Tensor:
        """The same in torch."""
        return torch.from_numpy(self.numbers(rows))

    def back(self, rows: int) -> Tensor:
        """(rows,): for each row of the model its number as it is stored."""
        return self.of(rows).argsort()


@dataclass(frozen=True)
class Reordered(Wrapped):
    """The change that `inner` makes of rows in the model's order, for the same rows as they are stored.

    For a product only the rows of its first factor move: P (B A) = (P B) A.
    """

    order: RowOrder
    rows: int  # of the weight
    start: int = 0  # the row of `inner` that is the first of them

    @property
    def adds_products(self) -> bool:  # type: ignore[override]  # a constant for the other kinds
        return self.inner.adds_products

    @property
    def depends_on_weight(self) -> bool:  # type: ignore[override]
        return self.inner.depends_on_weight

    @property
    def needs_weight(self) -> bool:
        return self.inner.needs_weight

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.inner.shape[1:])

    def norm(self) -> float:
        return self.inner.norm() if not self.start and self.inner.shape[0] == self.rows else math.inf

    def prepared(self, weight: WeightRows) -> Update:
        def in_order(first: int = self.start, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
            some = slice(first - self.start, None if count is None else first - self.start + count)
            every = whole(weight)
            yield first, every[self.order.back(self.rows)[some].to(every.device)]

        return replace(self, inner=self.inner.prepared(in_order))

    def delta(self, weight: Tensor) -> Tensor:
        change = self.inner.delta(weight[self.order.back(self.rows).to(weight.device)])
        return change[self.order.of(self.rows).to(weight.device)]

    def add_rows(self, rows: Tensor, first_row: int, strength: float, base: Tensor) -> None:
        there = self.order.of(self.rows)[first_row : first_row + len(rows)].tolist()
        for at, row in enumerate(there):
            self.inner.add_rows(rows[at : at + 1], self.start + row, strength, base[at : at + 1])

    def products(self, columns: int) -> tuple[Product, ...]:
        index = self.order.of(self.rows) + self.start
        found = []
        for product in self.inner.products(columns):
            up = product.up
            if product.first or len(up) < self.start + self.rows:
                up = up.new_zeros(max(self.start + self.rows, product.first + len(up)), up.shape[1])
                up[product.first : product.first + len(product.up)] = product.up
            found.append(Product(0, up[index.to(up.device)], product.down, product.scale))
        return tuple(found)
