"""What was written is read again, and held against what was read first: ‖ΔW − ΔW'‖ / ‖ΔW‖ of every layer, in float64.

DoRA's lengths, biases, tensors saved whole and token rows are compared in the same way, by their values.
Nothing that made the output is used: the file goes through the reader of its dialect. No ΔW is formed: the difference of two
products is a product, whose norm takes a QR of its factors. Where both have the same `down`, which is the usual case, it is
the difference of their `up` times that, and no QR is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Derived, StoredTensor, same_values, stored_tensors, unloaded
from loratool.adapters.formats.format import Spelling
from loratool.adapters.layers import Contents, Kind, Layer
from loratool.algebra.lowrank.products import Product, difference, inner, length, length_near
from loratool.files.safefile import FLOAT_NAMES
from loratool.grouping import by_key
from loratool.lazy import Tensor, torch
from loratool.reworking.converting import wholes
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
    return by_key(
        (rows.target, Held(name, expert, at, rows))
        for name, target in targets.items()
        for expert, at, rows in target.places
    )


def read_back(targets: Mapping[str, Target], names: Spelling) -> dict[str, Target]:
    """The layers of an output as its dialect's reader calls them: of a stack of experts one for each."""
    found: dict[str, Target] = {}
    for name, target in targets.items():
        if (called := names.read_as(name)) is None:
            found[name] = target
        else:
            found |= {
                called(n): replace(target, kind=Kind.LINEAR, experts=(own,)) for n, own in enumerate(target.experts)
            }
    return found


@dataclass(frozen=True)
class Comparison:
    """The input, and the output as it was read back."""

    given: Contents
    found: Contents
    places: Mapping[str, list[Held]]
    dtype: str  # of the output's factors, as torch calls it
    moved: Mapping[str, Moved]  # what DoRA makes of layers that are written as LoRA
    full: Mapping[str, Target]  # where what is stored in full was written
    copied: Collection[str] = ()  # layers of the output whose factors must be bytes of the input

    def compare(self, target: str) -> Compared:
        """One layer of the input with what was written of it, its lengths of rows included."""
        found = self.compare_products(target)
        lost = self.lengths_lost(target)
        if not lost:
            return found
        return Compared(found.norm or length(loaded(self.given.layers[target])), max(lost, found.error), found.limit)

    def lengths_lost(self, target: str) -> float:
        """The relative error of the lengths of rows that DoRA gives a layer; infinite where one side alone has any."""
        own, places = self.given.layers[target].magnitude, self.places.get(target, [])
        others = [self.found.layers[place.target].magnitude for place in places]
        if own is None or None in others:
            return 0.0 if own is None and not any(others) else math.inf
        if any(other.by_column != own.by_column for other in others if other):
            return math.inf
        wanted, lost = values_of(own.magnitude).flatten(), 0.0
        for place, other in zip(places, others, strict=True):
            assert other is not None, "all have one"
            found = values_of(other.magnitude).flatten()
            if own.by_column:
                part, there = wanted, found
            else:
                part = wanted[place.rows.first : place.rows.first + place.rows.count]
                there = found[place.first : place.first + place.rows.count]
            lost = math.inf if part.shape != there.shape else math.hypot(lost, float((part - there).norm()))
        return relative(lost, float(wanted.norm()))

    def beside(self) -> dict[str, float]:
        """The relative error of everything that is no layer: biases of factors, tensors saved whole, rows of tokens.

        Those that the output alone has must be zeros, as PEFT asks for a bias of every layer.
        """
        errors = self.bias_errors() | wholes.lost(self.given, self.found, self.full)
        one, other = self.given.bases, self.found.bases
        for target in (*one, *(other.keys() - one.keys())):
            own, there = (table[target].value if target in table else None for table in (one, other))
            errors[target] = apart_from(own, there)
        for target in (*self.given.rows, *(self.found.rows.keys() - self.given.rows.keys())):
            first, second = (contents.rows.get(target) for contents in (self.given, self.found))
            same = first is not None and second is not None and first.index == second.index
            errors[target] = apart_from(first.values, second.values) if same and first and second else math.inf
        return errors

    def limit(self, target: str) -> float:
        """The largest error that rounding may have made of what is no layer: of biases, in which a scale is put, and sums."""
        value: object = getattr(self.given.changes.get(target), "value", None)
        rounded = value if isinstance(value, Derived) else self.given.biases.get(target)
        stored = [each.info.dtype for each in stored_tensors(rounded)]
        return max([EXACT, *(2 * UNIT[FLOAT_NAMES[dtype]] for dtype in stored)])

    def bias_errors(self) -> dict[str, float]:
        rest = {bias: self.found.load_bias(bias) for bias in self.found.biases}
        errors: dict[str, float] = {}
        for bias in self.given.biases:
            own, weight = self.given.load_bias(bias), f"{bias.removesuffix('bias')}weight"
            lost = own.clone()
            for place in self.places.get(weight, []):
                if (there := rest.get(f"{place.target.removesuffix('weight')}bias")) is not None:
                    rows = slice(place.first, place.first + place.rows.count)
                    lost[place.rows.first : place.rows.first + place.rows.count] -= there[rows]
                    there[rows] = 0.0
            errors[bias] = relative(float(lost.norm()), float(own.norm()))
        return errors | {bias: math.inf for bias, values in rest.items() if bool(values.any())}

    def compare_products(self, target: str) -> Compared:
        """ΔW of one layer of the input with what was written of it."""
        layer, places = self.given.layers[target], self.places.get(target, [])
        if target in self.moved:
            norm, lost = self.moved[target].apart(self.written(places))
            return Compared(norm, lost / norm if norm else lost, 0.0)
        if self.is_as_it_was(layer, places):
            after = self.found.layers[places[0].target]
            error = abs(1 - after.scale / layer.scale) if layer.scale else abs(after.scale)
            if error <= EXACT:  # else the same bytes are the same update only where they are zeros
                return Compared(None, error, EXACT)
        whole = loaded(layer)
        sizes = float(torch.linalg.vector_norm(whole.up) * torch.linalg.vector_norm(whole.down))
        norm = length_near(whole, sizes)
        lost = math.hypot(
            *(apart(one, other) for one, other in self.pairs(whole, places)),
            *map(length, self.left_out(layer, whole, places)),
        )
        unit = UNIT[self.dtype]
        copied = any(place.target in self.copied for place in places)
        limit = max(EXACT, 4 * unit * max(1.0, sizes / norm)) if norm and not copied else 0.0
        return Compared(norm, lost / norm if norm else lost, limit)

    def written(self, places: list[Held]) -> Iterator[tuple[int, Product]]:
        """Rows of a layer as they were written, each with the number of the first."""
        for place in places:
            whole = loaded(self.found.layers[place.target])
            yield place.rows.first, Rows(place.target, place.first, place.rows.count).cut(whole)

    def pairs(self, whole: Product, places: list[Held]) -> Iterator[tuple[Product, Product]]:
        """Rows as they were, and as they are."""
        opened: dict[str, Product] = {}
        for place in places:
            if place.target not in opened:
                opened[place.target] = loaded(self.found.layers[place.target])
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
        after = self.found.layers[places[0].target]
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
            product = loaded(self.found.layers[place.target])
            product = product if product.up.dim() == 2 else product[place.expert]
            sizes.append(length(Product(product.up[place.first : place.first + place.rows.count], product.down)))
        return max(sizes)


def values_of(stored: Any) -> Tensor:
    """The values of a tensor on disk, in float64."""
    return unloaded(stored).load(torch.device("cpu"), torch.float64)


def relative(lost: float, size: float) -> float:
    return lost / size if size else lost


def apart_from(one: Any, other: Any) -> float:
    """‖one − other‖ / ‖one‖ of two tensors on disk; infinite where one is missing, or has another shape."""
    if one is None or other is None or tuple(one.shape) != tuple(other.shape):
        return math.inf
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor) and same_values(one, other):
        return 0.0
    wanted = values_of(one).double()
    return relative(float((wanted - values_of(other)).norm()), float(wanted.norm()))


def loaded(layer: Layer) -> Product:
    """ΔW of a layer in float64, the scale in it."""
    return layer.load(torch.device("cpu"), torch.float64)


def apart(one: Product, other: Product) -> float:
    """‖one − other‖, Frobenius."""
    if one.down.shape == other.down.shape and torch.equal(one.down, other.down):
        changed = Product(one.up - other.up, one.down)
        return math.sqrt(max(0.0, float(inner(changed, changed).sum())))
    return length(difference(one, other))
