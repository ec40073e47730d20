"""How far elements of a merged weight are from the formula, in units in the last place at the size of the operands."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.algebra.rounding import bits_of
from loratool.lazy import Tensor, numpy, torch

if TYPE_CHECKING:
    from loratool.merging.exact_rows import ExactSum

MOST_ROWS = 32  # of a tensor, with elements that are farther than 1 ulp, that are remembered
TERMS = 8  # roundings of an element in float32 where an update is no sum of products, besides those of a row's norm
SINGLE, DOUBLE = 2.0**-24, 2.0**-53  # half the distance from 1 to the next float32, and float64


@dataclass
class Distances:
    """What was seen of one tensor, by all threads that look at its blocks."""

    elements: int = 0
    unequal: int = 0  # that are another number than the formula's once rounded
    ulp: float = 0.0  # the largest distance
    squared: float = 0.0  # Σ of squared distances from the formula
    beyond: int = 0  # elements that are farther than 1 ulp
    beyond_single: int = 0  # those of float64 that are so even if ΔW was computed in float32
    rows: list[int] = field(default_factory=list)  # of some of them
    parameters: dict[str, int] = field(default_factory=dict)  # of a quantised one, by tensor: how many are off
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def equal(self) -> float:
        """The share of elements that are the formula's."""
        return 1 - self.unequal / self.elements if self.elements else 1.0

    @property
    def near(self) -> float:
        """The share of elements that are not beyond what is allowed."""
        return 1 - self.beyond / self.elements if self.elements else 1.0

    def note(self, elements: int, found: Found | None) -> None:
        """Account for a block."""
        with self.lock:
            self.elements += elements
            if found is not None:
                self.unequal += found.unequal
                self.ulp = max(self.ulp, found.ulp)
                self.squared += found.squared
                self.beyond += found.beyond
                self.beyond_single += found.beyond if found.beyond_single is None else found.beyond_single
                self.rows = sorted({*self.rows, *found.rows})[:MOST_ROWS]


@dataclass(frozen=True)
class Found:
    """Of a block in which some elements differ."""

    unequal: int
    ulp: float
    squared: float
    beyond: int
    rows: tuple[int, ...]
    beyond_single: int | None = None  # of float64; all that are beyond unless it is given


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two blocks of one dtype hold the same bits."""
    if ours.is_cuda:
        return bool(torch.equal(bits_of(ours), bits_of(theirs)))
    one, other = (bits_of(each.contiguous()).numpy().reshape(-1) for each in (ours, theirs))
    return numpy.array_equal(one, other)  # several times faster than torch's


def differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """The places, in the flat order, of elements that are not the same number; −0 is 0, and a NaN is a NaN."""
    from loratool.merging.exact_rows import places_unlike  # with all that torch computes

    places = places_unlike(*(bits_of(each.contiguous()) for each in (ours, theirs)))
    first, second = ours.reshape(-1)[places], theirs.reshape(-1)[places]
    return places[(first != second) & ~(first.isnan() & second.isnan())]


def measure(
    before: Tensor,
    ours: Tensor,
    theirs: Tensor,
    first: int,
    total: ExactSum | None = None,
    formula: bool = False,
    doubt: float = 0.0,
) -> Found | None:
    """What differs between two blocks of rows of the same dtype; None where nothing does.

    Args:
        before: (n, width) W as it is stored.
        ours: (n, width) W' as the formula gives it, rounded once.
        theirs: (n, width) W' of the merged model.
        first: the first row.
        total: what was added, if it is a sum of products: what arithmetic may take from those does not count, which is that
            in float32, or in float64 where W' has that dtype.
        formula: whether what was added is worked out in another way, such as by norms of rows: the same holds for it,
            at the size of most elements of a row, for they may be sums of all of them.
        doubt: how far it may be off besides, where tools work it out in float32.
    """
    places, width = differences(ours, theirs), ours.shape[1]
    elements = Elements(places, *(each.reshape(-1)[places] for each in (before, ours, theirs)))
    if not formula:
        return elements.measured(first, width, total)
    rows, at = torch.unique(places // max(1, width), return_inverse=True)
    w, o = before[rows].double(), ours[rows].double()
    sizes = torch.stack([each.square().mean(1) for each in (w, o, o - w)]).amax(0).sqrt()[at]
    return elements.measured(first, width, total, sizes, doubt)


@dataclass(frozen=True)
class Elements:
    """Single elements of a block, on any device."""

    places: Tensor  # (count,) in the flat rows
    before: Tensor  # W
    ours: Tensor  # W' as the formula gives it, rounded once
    theirs: Tensor  # W' of the merged model, in the same dtype

    def unequal(self) -> Elements:
        """Those that are not the same number."""
        odd = (self.ours != self.theirs) & ~(self.ours.isnan() & self.theirs.isnan())
        return Elements(self.places[odd], self.before[odd], self.ours[odd], self.theirs[odd])

    def measured(
        self, first: int, width: int, total: ExactSum | None, sizes: Tensor | None = None, doubt: float = 0.0
    ) -> Found | None:
        """How far they are apart; all of them are unequal.

        `first`, `total` and `doubt` are as for `measure`; `sizes`, (count,), are those of most elements of each one's row, where
        arithmetic may take something from them.
        """
        if not len(self.places):
            return None
        wide = torch.float32 if self.ours.element_size() == 2 and self.before.element_size() <= 4 else torch.float64
        w, o, t = (each.to(wide) for each in (self.before, self.ours, self.theirs))
        size = torch.maximum(torch.maximum(w.abs(), o.abs()), (o - w).abs())
        ulp = ulp_of(size, self.ours.dtype)
        apart = (t - o).abs()
        distance = apart / ulp
        far, beyond_single = distance > 1, None
        if (total is not None or sizes is not None) and bool(far.any()):
            some = self.places[far]
            if total is not None:
                terms = terms_of(total, first + some // width, some % width).to(distance)
            elif sizes is not None:
                terms = torch.maximum(size[far], sizes[far].to(distance)) * (TERMS + math.sqrt(width))
            in_float64 = self.ours.dtype == torch.float64
            if in_float64:
                beyond_single = int((apart[far] - SINGLE * terms > ulp[far]).sum())
            slack = terms * (DOUBLE if in_float64 else SINGLE) + doubt
            less = (apart[far] - slack).clamp(min=0) / ulp[far]
            distance[far] = torch.where(less <= 1, less, distance[far])
        distance = distance.nan_to_num(torch.inf, torch.inf)
        far = distance > 1
        rows = (first + torch.unique(self.places[far] // width)[:MOST_ROWS]).tolist()
        squared = float(apart.nan_to_num(0, 0).square().sum(dtype=torch.float64))
        return Found(len(w), float(distance.max()), squared, int(far.sum()), tuple(rows), beyond_single)


def ulp_of(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype at some sizes, in the dtype that those are given in."""
    about, (_, exponent) = torch.finfo(dtype), torch.frexp(sizes)
    return torch.ldexp(torch.full_like(sizes, about.eps), exponent - 1).clamp(min=about.smallest_normal * about.eps)


def terms_of(total: ExactSum, rows: Tensor, columns: Tensor) -> Tensor:
    """How far a product may be from the exact one at some places, in unit roundoffs: n Σ |up| · |down|, bounded by lengths.

    Where W and ΔW are both small by cancellation within the product, that is many ulp (Higham, *Accuracy and Stability
    of Numerical Algorithms*, section 3.1).
    """
    found = torch.zeros(len(rows), dtype=torch.float64)
    at, across = rows.cpu().numpy(), columns.cpu().numpy()
    for stack in total.stacks:
        own, own_columns, inside = stack.place.own(at, across)
        size = stack.lengths[own] * stack.spans[own_columns] * (abs(stack.scale) * stack.terms)
        found += torch.from_numpy(size if inside is None else size * inside)
    return found
