"""Which rows of an adapter's layers the layers of another consist of.

Dialects disagree about what is one layer: some have q, k and v apart, or each expert, others have them in one weight. Rows
of a product are a product: those of `up` with the same `down`. So a layer is cut by cutting `up`, exactly; components that
these rows do not use go. Layers become one, exactly too, with their `down` one below the other and their `up` as the blocks
of a diagonal; where all of them have the same `down`, it is kept once, and the rank with it. Cutting gives back what was put
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from loratool.adapters.adapter import StoredTensor, same_values
from loratool.adapters.layers import Form, Kind, Layer
from loratool.algebra.lowrank.products import Product, padded
from loratool.lazy import Tensor, torch

SAME = 1e-7  # a factor that differs from 1 by less is none: α is stored as a float32
Load = Callable[[str], Product]  # the factors of a layer by its target, without its scale, a batch of those of experts


@dataclass(frozen=True)
class Outline:
    """The sides of a weight or bias that is stored in full, or of a layer that is yet to be made."""

    target: str
    rows: int
    columns: int  # 0 of a bias whose weight the adapter does not have
    kind: Kind = Kind.LINEAR
    experts: int = 1


Sized = Layer | Outline  # what says which rows of it go where


@dataclass(frozen=True)
class Rows:
    """Some rows of a layer that is read, or zeros."""

    target: str  # empty for zeros
    first: int
    count: int
    expert: int | None = None  # of a parameter
    components: tuple[int, ...] | None = None  # of the rank, those that these rows use; None for all

    def cut(self, product: Product) -> Product:
        """These rows of the layer."""
        product = product if self.expert is None else product[self.expert]
        up, down = product.up[self.first : self.first + self.count], product.down
        if self.components is not None:
            index = torch.tensor(self.components)
            up, down = up.index_select(1, index), down.index_select(0, index)
        return replace(product, up=up, down=down)


@dataclass(frozen=True)
class Target:
    """A layer that is written: the rows that it consists of, one after the other, for each of its experts."""

    kind: Kind
    experts: tuple[tuple[Rows, ...], ...]  # one for all that is no parameter

    @classmethod
    def same(cls, layer: Sized) -> Target:
        """The layer as it is."""
        every = range(layer.experts) if layer.kind is Kind.PARAMETER else (None,)
        return cls(layer.kind, tuple((Rows(layer.target, 0, layer.rows, expert),) for expert in every))

    @property
    def parts(self) -> Iterable[Rows]:
        """All of its rows that are not zeros."""
        return (part for parts in self.experts for part in parts if part.target)

    @property
    def places(self) -> Iterator[tuple[int, int, Rows]]:
        """All of its rows, zeros too: the expert, the row there, and what lies from it on."""
        for expert, parts in enumerate(self.experts):
            starts = accumulate((part.count for part in parts), initial=0)
            yield from ((expert, at, part) for at, part in zip(starts, parts, strict=False))

    @property
    def sources(self) -> tuple[str, ...]:
        """The layers that any of it comes from."""
        return tuple(dict.fromkeys(part.target for part in self.parts))

    def is_whole(self, layers: Mapping[str, Sized]) -> bool:
        """Whether it is one layer, unchanged."""
        only = self.sources[0] if len(self.sources) == 1 else ""
        return bool(only) and replace(self, kind=layers[only].kind) == Target.same(layers[only])

    def rank(self, layers: Mapping[str, Layer]) -> int:
        """The largest rank of its experts."""
        return max(rank_of([part for part in parts if part.target], layers) for parts in self.experts)

    def form(self, layers: Mapping[str, Layer], rank: int) -> Form:
        """What is known of it before its factors are."""
        first = layers[self.sources[0]]
        rows = sum(part.count for part in self.experts[0])
        return Form(self.kind, rows, first.columns, rank, len(self.experts), first.kernel)

    def product(self, load: Load, scales: Mapping[str, float], rank: int) -> Product:
        """Its factors, multiplied by `scales` of the layers that they come from."""
        if self.kind is not Kind.PARAMETER:
            return padded(joined(self.experts[0], load, scales), rank)
        own = [
            padded(joined(parts, load, scales), rank) if any(rows.target for rows in parts) else None
            for parts in self.experts
        ]
        zero = next(product for product in own if product is not None).scaled(0.0)
        every = [zero if product is None else product for product in own]
        return Product(torch.stack([p.up for p in every]), torch.stack([p.down for p in every]))


def rank_of(parts: Sequence[Rows], layers: Mapping[str, Layer]) -> int:
    """The rank of some rows together."""
    distinct: list[Rows] = []
    for part in parts:
        if not any(same_down(part, other, layers) for other in distinct):
            distinct.append(part)
    return sum(layers[p.target].rank if p.components is None else len(p.components) for p in distinct)


def same_down(one: Rows, other: Rows, layers: Mapping[str, Layer]) -> bool:
    """Whether two parts have the same `down`, so that it is kept once."""
    if (one.target, one.expert, one.components) == (other.target, other.expert, other.components):
        return True
    if one.components is not None or other.components is not None or one.expert is not None:
        return False
    first, second = layers[one.target].factors[1], layers[other.target].factors[1]
    return isinstance(first, StoredTensor) and isinstance(second, StoredTensor) and same_values(first, second)


def joined(parts: Sequence[Rows], load: Load, scales: Mapping[str, float]) -> Product:
    """Rows of several layers as one product."""
    found = [
        (part, part.cut(load(part.target)).to(torch.float64).scaled(scales[part.target])) if part.target else None
        for part in parts
    ]
    only = [each for each in found if each]
    if len(found) == len(only) == 1:
        return only[0][1]
    distinct: list[Tensor] = []
    starts = [0]
    places: list[tuple[int, int, Tensor]] = []  # row, distinct down, up
    at = 0
    for part, each in zip(parts, found, strict=True):
        if each is not None:
            place = next((n for n, down in enumerate(distinct) if torch.equal(down, each[1].down)), len(distinct))
            if place == len(distinct):
                distinct.append(each[1].down)
                starts.append(starts[-1] + each[1].rank)
            places.append((at, place, each[1].up))
        at += part.count
    up = only[0][1].up.new_zeros(at, starts[-1])
    for row, place, block in places:
        up[row : row + block.shape[0], starts[place] : starts[place + 1]] = block
    return Product(up, torch.cat(distinct))


def narrowed(targets: Mapping[str, Target], layers: Mapping[str, Layer], load: Load) -> dict[str, Target]:
    """The same layers, those that are parts of others without the components that are zero in their rows.

    A part without any is left out, as one that the adapter does not change, unless the whole layer is zero.
    """
    found = dict(targets)
    for name, target in targets.items():
        part = target.experts[0][0]
        if len(target.experts) > 1 or len(target.experts[0]) > 1 or part.count == layers[part.target].rows:
            continue
        whole = load(part.target)
        used = part.cut(whole).up.any(0).nonzero().flatten().tolist()
        if not used and bool(whole.up.any()):
            del found[name]
        elif 0 < len(used) < whole.rank:
            found[name] = replace(target, experts=((replace(part, components=tuple(used)),),))
    return found


def gathered(parts: Sequence[Rows], values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One value for each row, of those of the layers that the rows come from; 0 where there is none."""
    found = [
        values[part.target][part.first : part.first + part.count].to(dtype)
        if part.target in values
        else torch.zeros(part.count, dtype=dtype)
        for part in parts
    ]
    return torch.cat(found)


def settled(wanted: float, said: float) -> float:
    """What rows are multiplied by, where a file says one scale and another is wanted: 1 where they mean the same."""
    if not said:
        return 1.0 if not wanted else math.nan
    factor = wanted / said
    return 1.0 if abs(factor - 1) <= SAME else factor
