"""What updates add to a weight: products of factors at their places, and what bounds the error of computing them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.algebra.updates.base import Product
from loratool.grouping import by_key
from loratool.lazy import NDArray, Tensor, numpy, torch
from loratool.merging.bounds import GENEROUS, ROUNDOFF, TINIEST
from loratool.merging.numpy_rounding import roundings

if TYPE_CHECKING:
    from loratool.bases.edits import Edit

    Mask = NDArray[numpy.bool_]
    Numbers = NDArray[numpy.float64]
    Places = NDArray[numpy.int64]

ALL = slice(None)
HELD = 2.0**-450, 2.0**511  # sizes whose squares float64 holds


@dataclass(frozen=True)
class Place:
    """Some rows and columns of a weight, which something has for its own."""

    first: int  # row of the weight
    rows: int
    columns: slice  # of the weight
    width: int  # how many those are

    @property
    def stop(self) -> int:
        return self.first + self.rows

    def meets(self, first: int, stop: int) -> bool:
        """Whether any of some rows of the weight are in here."""
        return self.first < stop and self.stop > first

    @property
    def frame(self) -> list[int]:
        """The first row, the rows, the first column, the step to the next one, the columns."""
        return [self.first, self.rows, self.columns.start or 0, self.columns.step or 1, self.width]

    def own(self, rows: Places, columns: Places) -> tuple[Places, Places, Mask | None]:
        """Own rows and columns of single elements, and which elements are in here; None where all are."""
        own, inside = rows - self.first, None
        if own.min() < 0 or own.max() >= self.rows:
            inside = (own >= 0) & (own < self.rows)
            own = own.clip(0, self.rows - 1)
        if self.columns == ALL:
            return own, columns, inside
        start, step = self.columns.start or 0, self.columns.step or 1
        across = ((columns - start) // step).clip(0, self.width - 1)
        met = across * step + start == columns
        return own, across, met if inside is None else inside & met


def modules_in(edits: Iterable[Edit], width: int) -> list[tuple[str, Place]]:
    """The target of each edit of a weight that has so many columns, with its place there."""
    return [(edit.target, Place(edit.first_row, edit.rows, edit.columns, width)) for edit in edits]


@dataclass(frozen=True)
class Addend:
    """What one product adds to some rows and columns of a weight."""

    place: Place
    up: Tensor  # (rows, rank)
    down: Tensor | None  # (rank, columns); where there is none, `up` are the values
    scale: float  # strength included
    module: str = ""  # the target of the update

    @classmethod
    def of(cls, product: Product, first: int, at: int, rows: int, columns: slice, strength: float) -> Addend | None:
        """The addend of a product that goes to `rows` rows of a weight from `first` on, which are the update's from `at` on."""
        start = max(product.first, at)
        stop = min(product.first + product.up.shape[0], at + rows)
        if start >= stop:
            return None
        up = product.up[start - product.first : stop - product.first]
        width = (up if product.down is None else product.down).shape[1]
        return cls(Place(first + start - at, len(up), columns, width), up, product.down, product.scale * strength)

    @property
    def rank(self) -> int:
        return self.up.shape[1] if self.down is not None else 1

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors on the CPU, (rows, rank) and (columns, rank); values, and nothing, where they are no product."""
        turned = torch.empty(self.up.shape[1], 0) if self.down is None else self.down.cpu().T.contiguous()
        return self.up.cpu(), turned

    def factors_at(self, rows: Places, columns: Places) -> tuple[Numbers, Numbers]:
        """Both factors of single elements in float64, (count, rank) each; zero for elements that are not this addend's."""
        own, across, inside = self.place.own(rows, columns)
        up, turned = (factor.numpy() for factor in self.factors)
        if self.down is None:
            left = up[own, across][:, None].astype(numpy.float64)
            right = numpy.ones_like(left)
        else:
            left, right = up.take(own, 0).astype(numpy.float64), turned.take(across, 0).astype(numpy.float64)
        return left if inside is None else left * inside[:, None], right


def by_place(addends: Iterable[Addend]) -> Iterable[list[Addend]]:
    """The addends in groups, each of one place and of one kind: products of two factors, or values."""
    places = ((each.place, each) for each in addends)
    return by_key(((at.first, at.rows, str(at.columns), each.down is None), each) for at, each in places).values()


@dataclass(frozen=True)
class Stack:
    """The addends of one place as one product in the working dtype, with the lengths that bound its error."""

    place: Place
    up: Tensor  # (rows, rank)
    down: Tensor | None
    scale: float
    lengths: Numbers  # (rows,) of the rows of `up`; their largest elements where there is no `down`
    spans: Numbers  # (columns,) lengths of the columns of `down`
    lifted: Tensor | None  # `down` with a row of ones, by which a constant is added in the product
    module: str  # the target of the first addend
    rounded: int = 2  # roundings of a product's factors, at most

    @classmethod
    def of(cls, addends: Sequence[Addend], work: torch.dtype) -> Stack:
        """One product of addends of the same place; each factor is rounded once at most."""
        scale = addends[0].scale if len(addends) == 1 else 1.0
        scaled = [addend.up if len(addends) == 1 else (addend.up.double() * addend.scale) for addend in addends]
        downs = [addend.down for addend in addends if addend.down is not None]
        if downs:
            ones = torch.ones_like(downs[0][:1])
            up = scaled[0].contiguous() if len(scaled) == 1 else torch.cat(scaled, 1)
            up, lifted = up.to(work), torch.cat([*downs, ones], 0).to(work)
            down = lifted[:-1]
            lengths, spans = lengths_along(up, 1), lengths_along(down, 0)
        else:
            up, down, lifted = sum(scaled[1:], scaled[0]).to(work), None, None
            lengths = torch.stack([each.abs().amax(1).double() for each in scaled]).sum(0)
            spans = torch.ones(up.shape[1], dtype=torch.float64)
        sizes = lengths.cpu().numpy(), spans.cpu().numpy()
        fit = all(f.dtype.itemsize <= work.itemsize for a in addends for f in (a.up, a.down) if f is not None)
        rounded = 0 if len(addends) == 1 and fit else 2
        return cls(addends[0].place, up, down, scale, *sizes, lifted, addends[0].module, rounded)

    @cached_property
    def span(self) -> float:
        """The largest of `spans`, times the scale."""
        return float(self.spans.max()) * abs(self.scale) * GENEROUS

    @cached_property
    def reach(self) -> float:
        """No element of the product is larger, and no sum of the sizes of what it is the sum of."""
        return float(self.lengths.max()) * self.span

    @property
    def terms(self) -> int:
        """Roundings of a term in an element, at most: of factors, the product, sums, scaling, and a constant added."""
        return 5 if self.down is None else self.rounded + roundings(self.up.shape[1], self.scale)

    @cached_property
    def underflow(self) -> float:
        """What underflow may take from an element."""
        return self.terms * TINIEST[self.up.dtype.itemsize] * (1 + abs(self.scale)) * (1 + float(self.spans.max()))

    def covers(self, first: int, count: int) -> bool:
        """Whether all of some rows of the weight are in here."""
        return self.place.first <= first and self.place.stop >= first + count and self.place.columns == ALL

    def rows_at(self, first: int, count: int) -> slice:
        """Which own rows are so many rows of the weight, all of which are in here."""
        return slice(first - self.place.first, first - self.place.first + count)

    def add_to(self, rows: Tensor, first: int) -> None:
        """Add some rows of the product to `rows`, which begin at row `first`."""
        start, stop = max(first, self.place.first), min(first + rows.shape[0], self.place.stop)
        up = self.up[start - self.place.first : stop - self.place.first]
        inside = rows[start - first : stop - first, self.place.columns]
        if self.down is None:
            inside.add_(up, alpha=self.scale)
        else:
            inside.addmm_(up, self.down, alpha=self.scale)

    def errors(self, first: int, stop: int) -> Numbers:
        """How far an element of some own rows of the product may be from the exact value: (stop − first,)."""
        return self.lengths[first:stop] * (self.span * self.terms * ROUNDOFF[self.up.dtype.itemsize])

    @cached_property
    def row_bounds(self) -> tuple[Tensor, Tensor]:
        """The same for all rows, as a tensor, and what no element of a row is larger than."""
        return torch.from_numpy(self.errors(0, len(self.lengths))), torch.from_numpy(self.lengths * self.span)

    @cached_property
    def most_error(self) -> float:
        """The most of them."""
        return float(self.errors(0, len(self.lengths)).max())


def lengths_along(factor: Tensor, dim: int) -> Tensor:
    """Lengths of the rows or columns of a factor in float64, or more; 0 for none but those of zeros."""
    plain, most = (torch.linalg.vector_norm(factor, order, dim=dim, dtype=torch.float64) for order in (2, 1))
    return torch.where((plain > HELD[0]) & (plain < HELD[1]), plain, most)
