"""Weights and biases that an adapter stores in full, as a dialect names and divides them: changes of them, or new values.

Dialects of image models have both for what is no layer, such as norms. Their rows are joined and cut as those of layers are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from loratool.adapters.adapter import Adapter, Derived, StoredTensor, derived, stored_tensors, unloaded
from loratool.adapters.formats.roles.names import of_factors
from loratool.adapters.layers import Contents, Layer
from loratool.adapters.writer import torch_dtype
from loratool.algebra.rounding import round_once
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.compound import Both
from loratool.algebra.updates.replacing import Replace
from loratool.bases.weights import Room, Stacked, StoredWeight
from loratool.errors import FitError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.results.text import plural
from loratool.reworking.converting.dora import piece_of
from loratool.reworking.converting.rows import Outline, Target

Full = Add | Replace
IN_FULL = ("comfy", "lycoris")  # dialects with changes of whole weights


def stored_in_full(contents: Contents) -> dict[str, Full]:
    """What an adapter stores in full, but for biases of its factors."""
    return {**contents.changes, **contents.saved}


def outlines(contents: Contents, others: Mapping[str, Update] = MappingProxyType({})) -> dict[str, Outline]:
    """The same by target, as naming takes it; `others` are updates that are kept as they are."""
    every = stored_in_full(contents)
    kept = {
        target: Outline(target, update.shape[0], max(0, math.prod(update.shape[1:])))
        for target, update in others.items()
    }
    return kept | {target: outline(target, update.shape, contents.layers, every) for target, update in every.items()}


def outline(target: str, shape: tuple[int, ...], layers: Mapping[str, Layer], others: Mapping[str, Full]) -> Outline:
    weight = f"{target.rpartition('.')[0]}.weight"
    if len(shape) > 1:
        columns = math.prod(shape[1:])
    elif weight in layers:
        columns = layers[weight].columns
    else:
        columns = math.prod(others[weight].shape[1:]) if weight in others and len(others[weight].shape) > 1 else 0
    return Outline(target, shape[0] if shape else 1, columns)


def with_biases_apart(contents: Contents, weights: Collection[str]) -> Contents:
    """The contents with biases of some layers as changes, as these layers are written as they are."""
    apart = {b: bias for b, bias in contents.biases.items() if f"{b.removesuffix('bias')}weight" in weights}
    rest = {b: bias for b, bias in contents.biases.items() if b not in apart}
    return replace(contents, biases=rest, changes={**contents.changes, **apart})


def widens(contents: Contents, target: Target) -> bool:
    """Whether a layer of the output changes a weight of more columns than the base's, as control adapters do.

    Those replace norms, too; in any other the name alone says that it may.
    """
    updates = (contents.layers[source].update for source in target.sources)
    return bool(contents.saved) and any(isinstance(update, LowRank) and update.widens for update in updates)


def check_norms(contents: Contents, dialect: str, architecture: str) -> None:
    """Raise `FitError` where norms are replaced that diffusers does not load from an adapter."""
    if dialect == "diffusers" and contents.saved and architecture not in ("flux", ""):
        raise FitError(
            f"diffusers replaces norms of Flux alone, and these are of {architecture}:", map(printable, contents.saved)
        )


@dataclass(frozen=True)
class Sum:
    """What a change makes of a weight or bias of a base: the formula of its new value."""

    weight: StoredWeight  # as a matrix
    scale: float

    def __call__(self, change: Tensor) -> Tensor:
        with OpenSources() as sources:
            own = self.weight.rows(0, self.weight.shape[0], change.device, change.dtype, Room(sources))
        return own.reshape(change.shape) + self.scale * change


@dataclass(frozen=True)
class Total:
    """What factors and a change that is stored in full come to: the formula of their sum."""

    product: LowRank
    scale: float  # of the change

    def __call__(self, up: Tensor, down: Tensor, change: Tensor) -> Tensor:
        return replace(self.product, up=up, down=down).delta(change) + self.scale * change


def added_up(adapter: Adapter, dialect: str) -> Adapter:
    """The adapter with one change in full of what it changes by factors and in full: no tool reads both of one weight."""
    found: dict[str, Update] = {}
    for target, update in adapter.updates.items() if dialect in IN_FULL else ():
        match update:
            case Both(LowRank() as product, Add() as change) | Both(Add() as change, LowRank() as product):
                formula = Total(product, change.scale)
                found[target] = Add(derived(change.shape, formula, product.up, product.down, change.value))
    if not found:
        return adapter
    text = f"{plural(len(found), 'weight')} changed by factors and in full, written as one change in full"
    return replace(adapter, updates={**adapter.updates, **found}, notes=(*adapter.notes, Note("written-in-full", text)))


def with_values(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with new values for what it changes in full, for a dialect that has values and no changes."""
    full = {
        target: update
        for target, update in adapter.updates.items()
        if isinstance(update, Add) and not of_factors(target, adapter.sources)
    }
    if not full:
        return adapter
    from loratool.bases.adapter_fit import fit_of

    fit = fit_of(replace(adapter, updates=full), base.root, base)
    fit.require()
    values: dict[str, Update] = {}
    for target, update in full.items():
        places = sorted(fit.places[target], key=lambda place: place.update_row)
        whole = Stacked(tuple(piece_of(place, fit) for place in places))
        values[target] = Replace(derived(update.shape, Sum(whole, update.scale), update.value))
    return replace(adapter, updates={**adapter.updates, **values})


def update_of(name: str, target: Target, every: Mapping[str, Full]) -> Full:
    """One weight or bias of the output, `every` being those of the input; rows that the adapter does not have are zeros.

    Raises `FitError` where a part of a new value is missing.
    """
    parts, first = target.experts[0], every[target.sources[0]]
    if any(type(every[source]) is not type(first) for source in target.sources):
        raise FitError(f"{printable(name)}: some of its rows are changed and others replaced")
    if isinstance(first, Replace) and not all(part.target for part in parts):
        raise FitError(f"{printable(name)}: the adapter replaces only some of its rows")
    if len(parts) == 1 and parts[0].first == 0 and (not first.shape or parts[0].count == first.shape[0]):
        return first
    stored = [every[source].value for source in target.sources]
    scales = [getattr(every[source], "scale", 1.0) for source in target.sources]

    def joined(*loaded: Tensor) -> Tensor:
        own = {s: value * scale for s, value, scale in zip(target.sources, loaded, scales, strict=True)}
        return torch.cat(
            [
                own[part.target][part.first : part.first + part.count]
                if part.target
                else loaded[0].new_zeros(part.count, *loaded[0].shape[1:])
                for part in parts
            ]
        )

    value = derived((sum(part.count for part in parts), *first.shape[1:]), joined, *stored)
    return Add(value) if isinstance(first, Add) else Replace(value)


def written(update: Full) -> StoredTensor | Tensor:
    """What is stored of it: the same bytes where it is as it was, else rounded once, to the widest dtype of its parts."""
    stored: object = update.value
    if isinstance(stored, StoredTensor) and getattr(update, "scale", 1.0) == 1.0:
        return stored
    dtypes = [torch_dtype(tensor.info.dtype) for tensor in stored_tensors(update)]
    if isinstance(stored, Derived) and isinstance(stored.formula, Sum):
        dtypes.append(torch.float32)
    return round_once(value_of(update), max(dtypes, key=lambda dtype: dtype.itemsize))


def value_of(update: Full) -> Tensor:
    """What is added or put in place, in float64."""
    found = unloaded(update.value).load(torch.device("cpu"), torch.float64)
    return found * update.scale if isinstance(update, Add) else found


def lost(given: Contents, found: Contents, beside: Mapping[str, Target]) -> dict[str, float]:
    """‖one − other‖ / ‖one‖ of what the input and the output store in full, by target of the input.

    Infinite where one side alone has something, or of another kind.
    """
    before, after = stored_in_full(given), stored_in_full(found)
    errors = dict.fromkeys((name for name in after if name not in beside), math.inf)
    distances: dict[str, float] = {}
    for name, target in beside.items():
        for _, at, part in target.places:
            there = rows_of(after.get(name), at, part.count)
            if part.target:
                apart = distance(rows_of(before[part.target], part.first, part.count), there)
                same = type(after.get(name)) is type(before[part.target])
                distances[part.target] = math.hypot(distances.get(part.target, 0.0), apart if same else math.inf)
            elif there is None or bool(there.any()):
                errors[name] = math.inf
    sizes = {name: float(value_of(before[name]).norm()) for name in distances}
    relative = {name: apart / sizes[name] if sizes[name] else apart for name, apart in distances.items()}
    return errors | relative | dict.fromkeys(before.keys() - distances.keys(), math.inf)


def rows_of(update: Full | None, first: int, count: int) -> Tensor | None:
    """Some rows of what is stored in full."""
    if update is None:
        return None
    value = value_of(update)
    return value[first : first + count] if value.dim() else value


def distance(one: Tensor | None, other: Tensor | None) -> float:
    """‖one − other‖; infinite of two shapes."""
    same = one is not None and other is not None and one.shape == other.shape
    return float((one - other).norm()) if same and one is not None and other is not None else math.inf
