"""Which rows of an adapter's layers the layers of another consist of.

Dialects disagree about what is one layer: some have q, k and v apart, or each expert, others have them in one weight. Rows
of a product are a product: those of `up` with the same `down`. So a layer is cut by cutting `up`, exactly. Layers become
one, exactly too, with their `down` one below the other and their `up` as the blocks of a diagonal; where all of them have
the same `down`, it is kept once, and the rank with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapters.layers import Form, Kind, Layer
from loratool.algebra.lowrank.products import Product, padded
from loratool.lazy import Tensor, torch

Load = Callable[[str], Product]  # the factors of a layer by its target, without its scale, a batch of those of experts


@dataclass(frozen=True)
class Rows:
    """Some rows of a layer that is read, or zeros."""

    target: str  # empty for zeros
    first: int
    count: int
    expert: int | None = None  # of a parameter


@dataclass(frozen=True)
class Target:
    """A layer that is written: the rows that it consists of, one after the other, for each of its experts."""

    kind: Kind
    experts: tuple[tuple[Rows, ...], ...]  # one for all that is no parameter

    @classmethod
    def same(cls, layer: Layer) -> Target:
        """The layer as it is."""
        batch = layer.kind is Kind.PARAMETER
        every = range(layer.experts) if batch else (None,)
        return cls(layer.kind, tuple((Rows(layer.target, 0, layer.rows, expert),) for expert in every))

    @property
    def sources(self) -> tuple[str, ...]:
        """The layers that any of it comes from."""
        return tuple(dict.fromkeys(part.target for parts in self.experts for part in parts if part.target))

    def rank(self, layers: Mapping[str, Layer]) -> int:
        """The rank of `joined`, before it is known whether parts have the same `down`."""
        return max(
            sum(layers[target].rank for target in {part.target for part in parts if part.target})
            for parts in self.experts
        )

    def form(self, layers: Mapping[str, Layer], rank: int) -> Form:
        """What is known of it before its factors are."""
        first = layers[self.sources[0]]
        rows = sum(part.count for part in self.experts[0])
        return Form(self.kind, rows, first.columns, rank, len(self.experts), first.kernel)

    def product(self, load: Load, scales: Mapping[str, float], rank: int) -> Product:
        """Its factors, multiplied by `scales` of the layers that they come from."""
        every = [padded(joined(parts, load, scales), rank) for parts in self.experts]
        if self.kind is not Kind.PARAMETER:
            return every[0]
        return Product(torch.stack([p.up for p in every]), torch.stack([p.down for p in every]))


def joined(parts: Sequence[Rows], load: Load, scales: Mapping[str, float]) -> Product:
    """Rows of several layers as one product."""
    found = {(p.target, p.expert): of_expert(load(p.target), p.expert) for p in parts if p.target}
    distinct: list[Tensor] = []
    place: dict[tuple[str, int | None], int] = {}
    for key, product in found.items():
        same = (n for n, down in enumerate(distinct) if torch.equal(down, product.down))
        place[key] = next(same, len(distinct))
        if place[key] == len(distinct):
            distinct.append(product.down)
    starts = [0]
    for down in distinct:
        starts.append(starts[-1] + down.shape[0])
    if len(parts) == 1 and parts[0].count == next(iter(found.values())).shape[0]:
        return times(next(iter(found.values())), scales[parts[0].target])
    like = next(iter(found.values()))
    up = like.up.new_zeros(sum(p.count for p in parts), starts[-1])
    at = 0
    for part in parts:
        if part.target:
            key = (part.target, part.expert)
            begin = starts[place[key]]
            rows = times(found[key], scales[part.target]).up[part.first : part.first + part.count]
            up[at : at + part.count, begin : begin + rows.shape[1]] = rows
        at += part.count
    return Product(up, torch.cat(distinct))


def of_expert(product: Product, expert: int | None) -> Product:
    return product if expert is None else product[expert]


def times(product: Product, factor: float) -> Product:
    """The product with `up` multiplied; in float64, so that it is rounded once."""
    if factor == 1.0:
        return product
    return replace(product, up=(product.up.double() * factor).to(product.up.dtype))


def complete(targets: Iterable[Target], layers: Mapping[str, Layer]) -> dict[str, int]:
    """Layers whose rows are not all used just once → how many rows are used."""
    used: dict[str, int] = dict.fromkeys(layers, 0)
    for target in targets:
        for part in (part for parts in target.experts for part in parts if part.target):
            used[part.target] += part.count
    return {target: count for target, count in used.items() if count != layers[target].rows * layers[target].experts}
