"""`compare()`: how alike adapters are, and how much in each other's way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from loratool.adapters.layers import ROUNDING_ONLY, Contents, Kind
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.weight_files import fates
from loratool.algebra.lowrank.clusters import linked
from loratool.algebra.lowrank.joint import Joint, joint
from loratool.algebra.lowrank.noise import silenced
from loratool.algebra.lowrank.pairwise import (
    MEASURES,
    Kept,
    Stack,
    kept_at,
    measures,
    stacked,
    working_precision,
)
from loratool.algebra.lowrank.products import Decomposition, Product, by_ranks, decompose
from loratool.algebra.lowrank.relations import Relation, relate
from loratool.arguments import PathLike, Progress
from loratool.errors import FitError, UsageError, printable
from loratool.fetching import local
from loratool.lazy import torch
from loratool.measuring.session import Session, session
from loratool.notes import Note
from loratool.options.described import FLAG, Number, option
from loratool.options.shared import DeviceOption
from loratool.results.compare import FEW, CompareReport, Forecast, Meeting, Notable, PairTotals
from loratool.results.matrix import Join, Matrix
from loratool.results.text import mean_of
from loratool.reworking.aligned_layers import AlignedLayer, align_layers, contents_apart
from loratool.reworking.dialects import ModelOption, unused_base
from loratool.reworking.renaming import dialect_of, named_alike

# which pairs are worth knowing about: by their cosine, and by directions that they share without being alike
SAME, ALIKE, OPPOSED = 0.999, 0.5, -0.2
SHARED, TIMES_CHANCE = 0.2, 3.0  # a part of the directions, and how often the part of random ones


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReadingOptions, DeviceOption, ModelOption):
    """Of `compare`."""

    pairs: bool = option(
        help=f"Show every pair layer by layer, even of more than {FEW} adapters, where a matrix is shown otherwise.",
        default=False,
        kind=FLAG,
    )
    rank: int | None = option(
        help="Rank of the forecast sum [default: the adapters' largest in each layer].",
        kind=Number(whole=True, low=1),
    )


def compare(adapters: Sequence[PathLike], options: CompareOptions, progress: Progress | None = None) -> CompareReport:
    """Relate every two of some adapters of one base; `loratool.commands.compare` says all of it."""
    started = time.monotonic()
    ways = options.readings(len(adapters))
    if len(adapters) < 2:
        raise UsageError("compare needs at least two adapters")
    paths = [local(path, "adapter") for path in adapters]
    sources = named_alike(contents_apart(paths, ways, "compare", options.model()))
    layers = align_layers(sources, [1.0] * len(sources))
    if not any(len(found) > 1 for found in layers.values()):
        raise FitError(
            "these adapters have no layer in common:",
            (f"{s.name}: {printable(next(iter(s.layers), 'no low-rank update'))}, …" for s in sources),
        )
    with session(options.device, ()) as at_work:
        comparer = Comparer(sources, layers, at_work, options)
        for found in at_work.through(comparer.look_at, layers, len(layers), progress):
            comparer.take(found)
    matrix = comparer.sums.matrix()
    totals = comparer.sums.totals(comparer.names)
    return CompareReport(
        adapters=tuple(comparer.names),
        norms=comparer.sums.norms(comparer.names),
        spectra=comparer.sums.spectra(comparer.names),
        totals=totals,
        modules={target: found for target, found in sorted(comparer.relations.items()) if comparer.in_full},
        alone=comparer.alone(),
        matrix=matrix,
        tree=tree(matrix),
        notable=notable(totals),
        forecast=comparer.forecast(),
        notes=tuple(comparer.remarks()),
        **at_work.told(started),
    )


@dataclass(frozen=True)
class Found:
    """One layer: which adapters have it, and what they have to do with each other."""

    target: str
    which: tuple[int, ...]
    products: torch.Tensor  # ⟨ΔWᵢ, ΔWⱼ⟩, (adapters, adapters) of those that have it
    squares: tuple[torch.Tensor, ...]  # of each adapter's singular values, falling
    measures: Mapping[str, torch.Tensor]  # of the shape of `products`, NaN where there is no number
    kept: tuple[Kept, ...]  # one for each expert
    relations: dict[str, Relation]  # "one × other"; empty where they are not asked for
    noise: tuple[int, ...]  # adapters whose update is rounding


class Comparer:
    """Some adapters, layer by layer and added up."""

    def __init__(
        self,
        sources: Sequence[Contents],
        layers: Mapping[str, Sequence[AlignedLayer]],
        at_work: Session,
        options: CompareOptions,
    ) -> None:
        self.sources, self.layers, self.at_work, self.rank = sources, layers, at_work, options.rank
        self.in_full = options.pairs or len(sources) <= FEW
        self.idle = unused_base(sources, dialect_of(sources[0])) if options.base is not None else ()
        self.names = [source.name for source in sources]
        self.sums = Sums(len(sources))
        self.which: dict[str, tuple[int, ...]] = {}
        self.noise: dict[str, tuple[int, ...]] = {}
        self.relations: dict[str, dict[str, Relation]] = {}

    def look_at(self, target: str) -> list[Found]:
        """Load the updates of a layer and relate every two of them."""
        aligned = self.layers[target]
        which = tuple(layer.adapter for layer in aligned)
        stacks = self.stacks(aligned)
        squares = [by_ranks(stack.values.square(), stack.ranks) for stack in stacks]
        every = [measures(stack) for stack in stacks]
        cut = min(self.rank or max(layer.layer.rank for layer in aligned), aligned[0].layer.most)
        related: dict[str, Relation] = {}
        if self.in_full:
            shared = silenced(joint(list(self.loaded(aligned, self.at_work.dtype))))
            related = relations([self.names[at] for at in which], shared)
        return [
            Found(
                target,
                which,
                products=torch.stack([stack.products() for stack in stacks]).sum(0),
                squares=tuple(map(added, zip(*squares, strict=True))),
                measures={name: torch.stack([found[name] for found in every]).nanmean(0) for name in MEASURES},
                kept=tuple(kept_at(stack, cut) for stack in stacks),
                relations=related,
                noise=tuple(sorted({which[at] for stack in stacks for at in stack.noise})),
            )
        ]

    def stacks(self, aligned: Sequence[AlignedLayer]) -> list[Stack]:
        """The updates of a layer: one stack, or one for each expert."""
        dtype = working_precision(sum(layer.layer.rank for layer in aligned))
        loaded = self.loaded(aligned, dtype if self.at_work.dtype == torch.float64 else self.at_work.dtype)
        if aligned[0].layer.kind is not Kind.PARAMETER:
            return [stacked(loaded)]
        products = list(loaded)
        return [stacked((p[at] for p in products), seed=at) for at in range(aligned[0].layer.experts)]

    def loaded(self, aligned: Sequence[AlignedLayer], dtype: torch.dtype) -> Iterator[Product]:
        return (layer.load(self.sources, self.at_work.device, dtype) for layer in aligned)

    def take(self, found: Found) -> None:
        """Add a layer up."""
        self.sums.add(found)
        self.which[found.target], self.noise[found.target] = found.which, found.noise
        self.relations[found.target] = found.relations

    def forecast(self) -> Forecast:
        """What a sum of all would keep of each."""
        sums = self.sums
        energies = {
            name: min(1.0, float(sums.kept[at] / sums.products[at, at])) if float(sums.products[at, at]) > 0 else None
            for at, name in enumerate(self.names)
        }
        # the same sum of squares in two ways: rounding alone brings one above the other
        whole = min(1.0, sums.of_sum / sums.sum) if sums.sum > 0 else None
        return Forecast(self.rank, energies, whole, mean_of(sums.interference))

    def alone(self) -> dict[str, tuple[str, ...]]:
        """Adapter → the layers that no other has."""
        only = {at: tuple(t for t, which in self.which.items() if which == (at,)) for at in range(len(self.names))}
        return {self.names[at]: targets for at, targets in only.items() if targets}

    def remarks(self) -> Iterator[Note]:
        """What a reader of the numbers should know."""
        yield from self.idle
        for source in self.sources:
            yield from (note.under(source.name) for note in fates(source.adapter.beside, otherwise="not compared"))
        bases = {source.training.base for source in self.sources} - {""}
        if len(bases) > 1:
            listed = ", ".join(sorted(map(printable, bases)))
            yield Note("base-mismatch", f"the adapters name different bases: {listed}")
        for name in (name for name, norm in self.sums.norms(self.names).items() if not norm):
            text = "every update is zero (an untrained adapter has B = 0, or alpha is 0)"
            yield Note("adapter-without-effect", text).under(name)
        if whole := sum(len(source.changes) for source in self.sources):
            yield Note("changes-left-out", f"{whole} changes that are stored in full (diff, w_norm) are not compared")
        if dora := [source.name for source in self.sources if source.dora]:
            text = f"{', '.join(dora)}: only ΔW = s·BA of DoRA is compared, not the magnitudes"
            yield Note("dora-magnitudes-left-out", text)
        for at, name in enumerate(self.names):
            if noisy := [target for target, noise in self.noise.items() if at in noise]:
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
            found[field.name] = tuple(statistics.fmean(v[k] for v in values) for k in range(min(map(len, values))))
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


class Sums:
    """Everything about a number of adapters that adds up over layers."""

    def __init__(self, count: int) -> None:
        def nothing(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.products = nothing(count, count)  # ⟨ΔWᵢ, ΔWⱼ⟩
        self.sizes = nothing(count, count)  # ‖ΔWᵢ‖² over the layers that adapter j has too
        self.layers = nothing(count, count)  # that both have
        self.measured = {name: nothing(count, count) for name in MEASURES}
        self.known = {name: nothing(count, count) for name in MEASURES}  # layers with a number
        self.squares = [nothing(0) for _ in range(count)]  # Σσᵢ² over layers, by i
        self.kept = nothing(count)
        self.sum = self.of_sum = 0.0
        self.interference: list[float | None] = []

    def add(self, found: Found) -> None:
        which = torch.tensor(found.which)
        at = (which[:, None], which)
        self.products[at] += found.products
        self.sizes[at] += found.products.diagonal()[:, None]
        self.layers[at] += 1
        for adapter, squares in zip(found.which, found.squares, strict=True):
            self.squares[adapter] = added([self.squares[adapter], squares])
        for name, table in found.measures.items():
            self.measured[name][at] += table.nan_to_num(0.0)
            self.known[name][at] += (~table.isnan()).double()
        for kept in found.kept:
            self.kept[which] += kept.of_each
            self.sum, self.of_sum = self.sum + kept.sum, self.of_sum + kept.of_sum
        if len(found.which) > 1:
            self.interference.append(mean_of([kept.interference for kept in found.kept]))

    def tables(self) -> dict[str, list[list[float | None]]]:
        """Each measure for every two adapters, all layers together: cosine and norms of all, means of the others."""
        found = {name: self.measured[name] / self.known[name] for name in MEASURES}
        norms = self.sizes.clamp_min(0).sqrt()
        sizes = norms * norms.mT
        found["cosine"] = torch.where(sizes > 0, (self.products / sizes).clamp(-1, 1), math.nan)
        found["norm_ratio"] = torch.where(sizes > 0, norms.mT / norms, math.nan)
        return {
            name: [[None if math.isnan(v) else v for v in row] for row in table.tolist()]
            for name, table in found.items()
        }

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """‖ΔW‖ of each adapter, all its layers together."""
        return dict(zip(names, self.products.diagonal().clamp_min(0).sqrt().tolist(), strict=True))

    def spectra(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """√Σσᵢ² over the layers of each adapter, by i."""
        return {name: tuple(squares.sqrt().tolist()) for name, squares in zip(names, self.squares, strict=True)}

    def matrix(self) -> Matrix:
        tables = self.tables()
        return Matrix(**{field.name: tuple(map(tuple, tables[field.name])) for field in fields(Matrix)})

    def totals(self, names: Sequence[str]) -> dict[str, PairTotals]:
        """Every pair that has a layer in common."""
        tables, layers = self.tables(), self.layers.tolist()
        return {
            pair: PairTotals(layers=int(layers[i][j]), **{name: tables[name][i][j] for name in MEASURES})
            for pair, (i, j) in pairs(range(len(names)), names).items()
            if layers[i][j]
        }


def added(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of vectors of several lengths, the shorter ones as if zeros followed."""
    return torch.nn.utils.rnn.pad_sequence([*rows]).sum(1)


def tree(matrix: Matrix) -> tuple[Join, ...]:
    """Average linkage of 1 − cosine; adapters without a cosine count as unrelated."""
    cosines = torch.tensor([[value or 0.0 for value in row] for row in matrix.cosine], dtype=torch.float64)
    number: dict[tuple[int, ...], int] = {(at,): at for at in range(len(cosines))}
    joins: list[Join] = []
    for closeness, clusters in linked((1 + cosines) / 2):
        (new,) = (cluster for cluster in clusters if cluster not in number)
        one, other = sorted(at for cluster, at in number.items() if set(cluster) < set(new))
        number = {cluster: at for cluster, at in number.items() if not set(cluster) < set(new)}
        number[new] = len(cosines) + len(joins)
        joins.append(Join(one, other, 2 - 2 * closeness, len(new)))
    return tuple(joins)


def notable(totals: Mapping[str, PairTotals]) -> tuple[Notable, ...]:
    """The pairs worth knowing about, by the first of the rules that fits, those with the largest figures first."""
    found: list[tuple[int, Notable]] = []
    for pair, total in totals.items():
        cosine = total.cosine
        if cosine is None:
            continue
        overlap, chance = max(
            ((total.overlap_out or 0.0), (total.random_out or 0.0)),
            ((total.overlap_in or 0.0), (total.random_in or 0.0)),
        )
        rules = (
            (cosine >= SAME, Notable(pair, "same", cosine)),
            (cosine <= OPPOSED, Notable(pair, "opposed", cosine)),
            (cosine >= ALIKE, Notable(pair, "alike", cosine)),
            (overlap >= max(SHARED, TIMES_CHANCE * chance), Notable(pair, "shared-directions", overlap)),
        )
        found += [(number, entry) for number, (fits, entry) in enumerate(rules) if fits][:1]
    return tuple(entry for _, entry in sorted(found, key=lambda item: (item[0], -abs(item[1].value))))
