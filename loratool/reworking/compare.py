"""`compare()`: how alike adapters are, and how much in each other's way."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from loratool.adapters.formats import read_adapter
from loratool.adapters.layers import ROUNDING_ONLY, contents_of
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.weight_files import fates
from loratool.algebra.lowrank import Decomposition, Joint, Product, Relation, decompose, gram, joint, relate, silenced
from loratool.errors import FitError, UsageError, printable
from loratool.fetching import local
from loratool.measuring.session import PathLike, Progress, session
from loratool.notes import Note
from loratool.options.shared import DeviceOption
from loratool.results.compare import CompareReport, Meeting, PairTotals
from loratool.results.text import mean_of
from loratool.reworking.aligned_layers import gather, named_apart

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReadingOptions, DeviceOption):
    """Of `compare`."""


def compare(adapters: Sequence[PathLike], options: CompareOptions, progress: Progress | None = None) -> CompareReport:
    """Relate every two of some adapters of one base; `loratool.commands.compare` says all of it."""
    started = time.monotonic()
    ways = options.readings(len(adapters))
    paths = [local(path, "adapter") for path in adapters]
    if len(paths) < 2:
        raise UsageError("two adapters or more are compared")
    sources = named_apart(
        [contents_of(read_adapter(path, way), "compare") for path, way in zip(paths, ways, strict=True)]
    )
    layers = gather(sources, [1.0] * len(sources))
    if not any(len(found) > 1 for found in layers.values()):
        raise FitError(
            "these adapters have no layer in common:",
            (f"{s.name}: {printable(next(iter(s.layers), 'no low-rank update'))}, …" for s in sources),
        )
    names = [source.name for source in sources]
    together: torch.Tensor | None = None
    common: dict[str, list[float]] = {}
    modules: dict[str, dict[str, Relation]] = {}
    rounded: dict[str, list[str]] = {}  # adapter → layers whose update is rounding
    with session(options.device, ()) as at_work:

        def work(target: str) -> tuple[str, torch.Tensor, dict[str, Relation], list[int]]:
            found = layers[target]
            stored = joint([share.load(sources, at_work.device, at_work.dtype) for share in found])
            shared = silenced(stored)
            noise = [s.adapter for s, a, b in zip(found, stored.small, shared.small, strict=True) if a is not b]
            related = relations([names[share.adapter] for share in found], shared)
            return target, gram(shared.small), related, noise

        for target, table, found, noise in at_work.spread(work, layers):
            for at in noise:
                rounded.setdefault(names[at], []).append(target)
            which = [share.adapter for share in layers[target]]
            if together is None:
                together = table.new_zeros(len(names), len(names))
            for i, first in enumerate(which):
                for j, second in enumerate(which):
                    together[first, second] += table[i, j]
            for pair, (i, j) in pairs(which, names).items():
                both = common.setdefault(pair, [0.0, 0.0])
                both[0] += float(table[i, i])
                both[1] += float(table[j, j])
            modules[target] = found
            if progress:
                progress(len(modules), len(layers))
    assert together is not None, "there is a layer"
    totals = {}
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            pair = f"{one} × {names[j]}"
            if pair in common:
                sizes = [math.sqrt(max(0.0, value)) for value in common[pair]]
                every = [relation[pair] for relation in modules.values() if pair in relation]
                totals[pair] = total(every, float(together[i, j]), sizes[0], sizes[1])
    bases = {source.training.base for source in sources} - {""}
    notes = [note.under(s.name) for s in sources for note in fates(s.adapter.beside, otherwise="not compared")]
    if len(bases) > 1:
        notes.append(
            Note("base-mismatch", f"the adapters name different bases: {', '.join(sorted(map(printable, bases)))}")
        )
    norms = {name: math.sqrt(max(0.0, float(together[i, i]))) for i, name in enumerate(names)}
    for name in (name for name, norm in norms.items() if not norm):
        text = "every update is zero (an untrained adapter has B = 0, another may have an α of 0)"
        notes.append(Note("adapter-without-effect", text).under(name))
    if dora := [source.name for source in sources if source.dora]:
        notes.append(
            Note(
                "dora-magnitudes-left-out",
                f"{', '.join(dora)}: of DoRA only ΔW = s·BA is compared, without the magnitudes",
            )
        )
    for name, noisy in rounded.items():
        text = f"{len(noisy)} of {len(layers)} updates count as zero, {printable(noisy[0])} for one: each is {ROUNDING_ONLY}"
        notes.append(Note("update-is-rounding", text).under(name))
    return CompareReport(
        adapters=tuple(names),
        norms=norms,
        totals=totals,
        modules=dict(sorted(modules.items())),
        alone={
            name: targets
            for i, name in enumerate(names)
            if (targets := tuple(t for t, found in layers.items() if [s.adapter for s in found] == [i]))
        },
        notes=(*notes, *(note.under(source.name) for source in sources for note in source.adapter.notes)),
        **at_work.told(started),
    )


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
