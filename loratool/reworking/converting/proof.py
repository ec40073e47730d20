"""What was written is read again, and held against what was read first: ‖ΔW − ΔW'‖ / ‖ΔW‖ of every layer, in float64.

Nothing that made the output is used: the file goes through the reader of its dialect. No ΔW is formed: the difference of two
products is a product, whose norm takes a QR of its factors. Where both have the same `down`, which is the usual case, it is
the difference of their `up` times that, and no QR is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loratool.adapters.adapter import StoredTensor, same_values
from loratool.adapters.layers import Layer
from loratool.algebra.lowrank.products import Product, difference, inner, length
from loratool.lazy import torch
from loratool.reworking.converting.dora import Moved
from loratool.reworking.converting.rows import Rows, Target

# Half the distance of a number to the next, relative to it
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
EXACT = 1e-6  # what a conversion may change where its factors are float32


@dataclass(frozen=True)
class Held:
    """Rows of a layer that was read, and where they were written."""

    target: str  # of the output
    expert: int
    first: int  # row there
    rows: Rows


@dataclass(frozen=True)
class Compared:
    """A layer before and after."""

    norm: float | None  # ‖ΔW‖; None where both have the same bytes, so that nothing was computed
    error: float  # ‖ΔW − ΔW'‖ / ‖ΔW‖
    limit: float  # the largest error that rounding may have made


def places_of(targets: Mapping[str, Target]) -> dict[str, list[Held]]:
    """Layer that was read → where its rows went; those of "" are zeros."""
    found: dict[str, list[Held]] = {}
    for name, target in targets.items():
        for expert, parts in enumerate(target.experts):
            at = 0
            for rows in parts:
                found.setdefault(rows.target, []).append(Held(name, expert, at, rows))
                at += rows.count
    return found


@dataclass(frozen=True)
class Comparison:
    """The layers of the input, and those of the output as they were read back."""

    before: Mapping[str, Layer]
    after: Mapping[str, Layer]
    places: Mapping[str, list[Held]]
    dtype: torch.dtype  # of the output's factors
    moved: Mapping[str, Moved]  # what DoRA makes of layers that are written as LoRA

    def compare(self, target: str) -> Compared:
        """One layer of the input with what was written of it."""
        layer, places = self.before[target], self.places.get(target, [])
        if target in self.moved:
            norm, lost = self.moved[target].apart(self.written(places))
            return Compared(norm, lost / norm if norm else lost, 0.0)
        if self.is_as_it_was(layer, places):
            after = self.after[places[0].target]
            error = abs(1 - after.scale / layer.scale) if layer.scale else abs(after.scale)
            return Compared(None, error, EXACT)
        whole = loaded(layer)
        norm = length(whole)
        lost = math.hypot(
            *(apart(one, other) for one, other in self.pairs(whole, places)),
            *map(length, self.left_out(layer, whole, places)),
        )
        sizes = float(torch.linalg.vector_norm(whole.up) * torch.linalg.vector_norm(whole.down))
        unit = UNIT[str(self.dtype).removeprefix("torch.")]
        limit = max(EXACT, 4 * unit * max(1.0, sizes / norm)) if norm else 0.0
        return Compared(norm, lost / norm if norm else lost, limit)

    def written(self, places: list[Held]) -> Iterator[tuple[int, Product]]:
        """Rows of a layer as they were written, each with the number of the first."""
        for place in places:
            whole = loaded(self.after[place.target])
            yield place.rows.first, Rows(place.target, place.first, place.rows.count).cut(whole)

    def pairs(self, whole: Product, places: list[Held]) -> Iterator[tuple[Product, Product]]:
        """Rows as they were, and as they are."""
        opened: dict[str, Product] = {}
        for place in places:
            if place.target not in opened:
                opened[place.target] = loaded(self.after[place.target])
            other = opened[place.target]
            other = other if other.up.dim() == 2 else other[place.expert]
            there = Rows(place.target, place.first, place.rows.count)
            yield replace(place.rows, components=None).cut(whole), there.cut(other)

    def left_out(self, layer: Layer, whole: Product, places: list[Held]) -> Iterator[Product]:
        """The rows of a layer that were not written."""
        batch = whole.up.dim() == 3
        for expert in range(layer.experts):
            own = [place.rows for place in places if not batch or place.rows.expert == expert]
            at = 0
            for rows in sorted(own, key=lambda rows: rows.first):
                if rows.first > at:
                    yield Rows(layer.target, at, rows.first - at, expert if batch else None).cut(whole)
                at = rows.first + rows.count
            if at < layer.rows:
                yield Rows(layer.target, at, layer.rows - at, expert if batch else None).cut(whole)

    def is_as_it_was(self, layer: Layer, places: list[Held]) -> bool:
        """Whether a layer is one of the output, with the same factors byte for byte."""
        if len({place.target for place in places}) != 1:
            return False
        after = self.after[places[0].target]
        if (after.kind, after.experts, after.rows, after.columns, after.rank) != (
            layer.kind,
            layer.experts,
            layer.rows,
            layer.columns,
            layer.rank,
        ):
            return False
        pairs = tuple(zip(layer.factors, after.factors, strict=True))
        return all(isinstance(x, StoredTensor) and isinstance(y, StoredTensor) for x, y in pairs) and all(
            same_values(x, y) for x, y in pairs
        )

    def zeros(self) -> float:
        """The largest norm of rows that no layer of the input has."""
        sizes = [0.0]
        for place in self.places.get("", ()):
            product = loaded(self.after[place.target])
            product = product if product.up.dim() == 2 else product[place.expert]
            sizes.append(length(Product(product.up[place.first : place.first + place.rows.count], product.down)))
        return max(sizes)


def loaded(layer: Layer) -> Product:
    """ΔW of a layer in float64, the scale in it."""
    return layer.load(torch.device("cpu"), torch.float64)


def apart(one: Product, other: Product) -> float:
    """‖one − other‖, Frobenius."""
    if one.down.shape == other.down.shape and torch.equal(one.down, other.down):
        changed = Product(one.up - other.up, one.down)
        return math.sqrt(max(0.0, float(inner(changed, changed).sum())))
    return length(difference(one, other))
