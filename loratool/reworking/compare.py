"""`compare()`: how alike adapters are, and how much in each other's way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from loratool.adapters.layers import ROUNDING_ONLY, Contents
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.weight_files import fates
from loratool.algebra.lowrank.joint import Joint, joint
from loratool.algebra.lowrank.noise import silenced
from loratool.algebra.lowrank.products import Decomposition, Product, decompose, gram
from loratool.algebra.lowrank.relations import Relation, relate
from loratool.errors import FitError, UsageError, printable
from loratool.fetching import local
from loratool.lazy import torch
from loratool.measuring.session import PathLike, Progress, Session, session
from loratool.notes import Note
from loratool.options.shared import DeviceOption
from loratool.results.compare import CompareReport, Meeting, PairTotals
from loratool.results.text import mean_of
from loratool.reworking.aligned_layers import AlignedLayer, align_layers, contents_apart
from loratool.reworking.renaming import named_alike


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReadingOptions, DeviceOption):
    """Of `compare`."""


def compare(adapters: Sequence[PathLike], options: CompareOptions, progress: Progress | None = None) -> CompareReport:
    """Relate every two of some adapters of one base; `loratool.commands.compare` says all of it."""
    started = time.monotonic()
    ways = options.readings(len(adapters))
    paths = [local(path, "adapter") for path in adapters]
    if len(paths) < 2:
        raise UsageError("compare needs at least two adapters")
    sources = named_alike(contents_apart(paths, ways, "compare"))
    layers = align_layers(sources, [1.0] * len(sources))
    if not any(len(found) > 1 for found in layers.values()):
        raise FitError(
            "these adapters have no layer in common:",
            (f"{s.name}: {printable(next(iter(s.layers), 'no low-rank update'))}, …" for s in sources),
        )
    with session(options.device, ()) as at_work:
        comparer = Comparer(sources, layers, at_work)
        for found in at_work.through(comparer.look_at, layers, len(layers), progress):
            comparer.found[found.target] = found
    return CompareReport(
        adapters=tuple(comparer.names),
        norms=comparer.norms(),
        totals=comparer.totals(),
        modules={target: found.relations for target, found in sorted(comparer.found.items())},
        alone=comparer.alone(),
        notes=tuple(comparer.remarks()),
        **at_work.told(started),
    )


@dataclass(frozen=True)
class Found:
    """One layer: which adapters have it, the inner products of their updates, and how these relate."""

    target: str
    which: tuple[int, ...]
    products: torch.Tensor  # ⟨ΔWᵢ, ΔWⱼ⟩, (adapters, adapters) of those that have it
    relations: dict[str, Relation]  # "one × other"
    noise: tuple[int, ...]  # adapters whose update is rounding


class Comparer:
    """Some adapters, layer by layer and added up."""

    def __init__(
        self, sources: Sequence[Contents], layers: Mapping[str, Sequence[AlignedLayer]], at_work: Session
    ) -> None:
        self.sources, self.layers, self.at_work = sources, layers, at_work
        self.names = [source.name for source in sources]
        self.found: dict[str, Found] = {}

    def look_at(self, target: str) -> list[Found]:
        """Load the updates of a layer and relate every two of them."""
        aligned = self.layers[target]
        stored = joint([layer.load(self.sources, self.at_work.device, self.at_work.dtype) for layer in aligned])
        shared = silenced(stored)
        noise = [s.adapter for s, a, b in zip(aligned, stored.small, shared.small, strict=True) if a is not b]
        which = tuple(layer.adapter for layer in aligned)
        related = relations([self.names[at] for at in which], shared)
        return [Found(target, which, gram(shared.small), related, tuple(noise))]

    def product(self, one: int, other: int, both: bool = True) -> float:
        """⟨ΔW, ΔW'⟩ over all layers; with `one` alone and not `both`, over those that `other` has too."""
        total = 0.0
        for found in self.found.values():
            if one in found.which and other in found.which:
                at = found.which.index(one)
                total += float(found.products[at, found.which.index(other) if both else at])
        return total

    def norms(self) -> dict[str, float]:
        """‖ΔW‖ of each adapter, all its layers together."""
        return {name: math.sqrt(max(0.0, self.product(at, at))) for at, name in enumerate(self.names)}

    def totals(self) -> dict[str, PairTotals]:
        """Every pair that has a layer in common."""
        totals = {}
        for pair, (i, j) in pairs(range(len(self.names)), self.names).items():
            every = [found.relations[pair] for found in self.found.values() if pair in found.relations]
            if every:
                sizes = [math.sqrt(max(0.0, self.product(a, b, both=False))) for a, b in ((i, j), (j, i))]
                totals[pair] = total(every, self.product(i, j), *sizes)
        return totals

    def alone(self) -> dict[str, tuple[str, ...]]:
        """Adapter → the layers that no other has."""
        only = {
            at: tuple(t for t, found in self.found.items() if found.which == (at,)) for at in range(len(self.names))
        }
        return {self.names[at]: targets for at, targets in only.items() if targets}

    def remarks(self) -> Iterator[Note]:
        """What a reader of the numbers should know."""
        for source in self.sources:
            yield from (note.under(source.name) for note in fates(source.adapter.beside, otherwise="not compared"))
        bases = {source.training.base for source in self.sources} - {""}
        if len(bases) > 1:
            listed = ", ".join(sorted(map(printable, bases)))
            yield Note("base-mismatch", f"the adapters name different bases: {listed}")
        for name in (name for name, norm in self.norms().items() if not norm):
            text = "every update is zero (an untrained adapter has B = 0, or alpha is 0)"
            yield Note("adapter-without-effect", text).under(name)
        if whole := sum(len(source.changes) for source in self.sources):
            yield Note("changes-left-out", f"{whole} changes that are stored in full (diff, w_norm) are not compared")
        if dora := [source.name for source in self.sources if source.dora]:
            text = f"{', '.join(dora)}: only ΔW = s·BA of DoRA is compared, not the magnitudes"
            yield Note("dora-magnitudes-left-out", text)
        for at, name in enumerate(self.names):
            if noisy := [target for target, found in self.found.items() if at in found.noise]:
                text = (
                    f"{len(noisy)} of {len(self.layers)} updates count as zero, such as {printable(noisy[0])}: each is "
                )
                yield Note("update-is-rounding", f"{text}{ROUNDING_ONLY}").under(name)
        for source in self.sources:
            yield from (note.under(source.name) for note in source.adapter.notes)


def pairs(which: Sequence[int], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The pairs of some adapters, and where each lies in `which`."""
    return {f"{names[a]} × {names[b]}": (i, j) for i, a in enumerate(which) for j, b in enumerate(which) if i < j}


def relations(names: Sequence[str], shared: Joint) -> dict[str, Relation]:
    """The relation of every two of a layer's updates; of a batch of experts their mean."""
    parts = [decompose(product) for product in shared.small]
    return {
        pair: related(shared.products[i], shared.products[j], parts[i], parts[j])
        for pair, (i, j) in pairs(range(len(names)), names).items()
    }


def related(one: Product, other: Product, first: Decomposition, second: Decomposition) -> Relation:
    if one.up.dim() == 2:
        return relate(one, other, first, second)
    every = [relate(one[at], other[at], piece(first, at), piece(second, at), seed=at) for at in range(one.up.shape[0])]
    found: dict[str, Any] = {}
    for field in fields(Relation):
        values = [getattr(relation, field.name) for relation in every]
        if field.name.startswith("angles"):
            shortest = min(map(len, values))
            found[field.name] = tuple(statistics.fmean(v[k] for v in values) for k in range(shortest))
        else:
            found[field.name] = mean_of(values)
    return Relation(**found)


def piece(whole: Decomposition, at: int) -> Decomposition:
    return Decomposition(whole.left[at], whole.values[at], whole.right[at])


def meetings(names: Sequence[str], shared: Joint) -> dict[str, Meeting]:
    """How much every two of a layer's updates are in each other's way."""
    return {
        pair: Meeting(**{field.name: getattr(relation, field.name) for field in fields(Meeting)})
        for pair, relation in relations(names, shared).items()
    }


def total(every: Sequence[Relation], product: float, first: float, second: float) -> PairTotals:
    """All layers of a pair, with the inner product of all and the norms over the layers that both have."""
    means = {
        field.name: mean_of([getattr(relation, field.name) for relation in every])
        for field in fields(PairTotals)
        if field.name not in ("layers", "cosine", "norm_ratio")
    }
    return PairTotals(
        layers=len(every),
        cosine=max(-1.0, min(1.0, product / (first * second))) if first * second else None,
        norm_ratio=second / first if first and second else None,
        **means,
    )
