"""What each module of a fleet gets: how its adapters are clustered, and how many directions each cluster shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from loratool.adapters.layers import Contents, Kind
from loratool.algebra.lowrank.clusters import Clustering, affinity, clusterings
from loratool.algebra.lowrank.products import Product, length, singular_values
from loratool.algebra.lowrank.shared_bases import WIDEST, energies, frame
from loratool.algebra.lowrank.spending import Choice, Curve, cost_of, spend, spend_least
from loratool.errors import UsageError
from loratool.measuring.session import Session
from loratool.reworking.aligned_layers import AlignedLayer
from loratool.reworking.compressing.options import CompressOptions

CORE = 4  # bytes of a number of a core, which is float32
ALL_CORES = 64 << 20  # bytes of factors of one module from which all cores work on it together

Found = dict[str, tuple[AlignedLayer, ...]]


@dataclass(frozen=True)
class Prices:
    """What numbers cost."""

    factor: float  # one of a basis, or of a triple
    core: float


@dataclass(frozen=True)
class Fleet:
    """Adapters with their layers side by side."""

    sources: Sequence[Contents]
    layers: Found
    at_work: Session
    norms: list[float] = field(default_factory=list)  # ‖ΔW‖ of each, all shared modules together

    @property
    def targets(self) -> list[str]:
        """The modules whose directions may be shared: all but stacks of experts."""
        return [target for target, found in self.layers.items() if found[0].layer.kind is not Kind.PARAMETER]

    @property
    def kept(self) -> list[str]:
        """Those that every adapter keeps as they are."""
        shared = set(self.targets)
        return [target for target in self.layers if target not in shared]

    def load(self, target: str) -> list[Product]:
        """The updates of a module, of each adapter that has it."""
        device, dtype = self.at_work.device, self.at_work.dtype
        return [aligned.load(self.sources, device, dtype) for aligned in self.layers[target]]

    def weights(self, target: str) -> list[float]:
        """ω = 1/‖ΔW‖² of each of these adapters, so that all count alike; 0 of one that is zero."""
        norms = [self.norms[aligned.adapter] for aligned in self.layers[target]]
        return [1 / norm**2 if norm else 0.0 for norm in norms]

    def bytes_of(self, target: str) -> int:
        """Bytes of the factors of a module in float64."""
        return sum(8 * aligned.layer.parameters * aligned.layer.rank for aligned in self.layers[target])

    def by_size(self) -> tuple[list[str], list[str]]:
        """Modules on which all cores work together, and those of which each core takes one."""
        large = {target: self.bytes_of(target) > ALL_CORES for target in self.targets}
        return [target for target in large if large[target]], [target for target in large if not large[target]]

    def measure(self) -> None:
        """Find the norms."""
        squares = [0.0] * len(self.sources)

        def work(target: str) -> list[tuple[str, list[float]]]:
            return [(target, [length(product) ** 2 for product in self.load(target)])]

        for target, found in self.at_work.through(work, self.targets, len(self.targets), None):
            for aligned, squared in zip(self.layers[target], found, strict=True):
                squares[aligned.adapter] += squared
        self.norms.extend(squared**0.5 for squared in squares)


def widest_of(fleet: Fleet, options: CompressOptions, prices: Prices) -> int:
    """Directions that a module may be given: twice what all could have if nothing but bases were bought."""
    if options.rank is not None:
        return min(WIDEST, options.rank)
    if options.energy is not None:
        return WIDEST
    sides = sum(layer.rows + layer.columns for t in fleet.targets for layer in [fleet.layers[t][0].layer])
    return max(1, min(WIDEST, math.ceil(2 * options.limit[0] / (prices.factor * max(1, sides)))))


@dataclass(frozen=True)
class Module:
    """What can be done with a module: clusterings of the adapters that have it, the last one each alone."""

    clusterings: tuple[Clustering, ...]
    offer: tuple[tuple[Curve, ...], ...]  # the curves of each

    @property
    def alone(self) -> tuple[tuple[Curve, ...]]:
        """The offer of truncation and nothing else."""
        return (self.offer[-1],)


def look_at(fleet: Fleet, target: str, prices: Prices, widest: int = WIDEST) -> Module:
    """The clusterings of a module and their curves, in bases of at most so many directions where these are streamed."""
    products, weights = fleet.load(target), fleet.weights(target)
    rows, columns = products[0].shape
    side = (rows + columns) * prices.factor
    alone = [alone_curve(product, weight, side) for product, weight in zip(products, weights, strict=True)]
    done: dict[tuple[int, ...], Curve] = {(at,): curve for at, curve in enumerate(alone)}

    def curve(cluster: tuple[int, ...]) -> Curve:
        if cluster not in done:
            own, ranks = [products[at] for at in cluster], [products[at].rank for at in cluster]
            within = frame(own, [weights[at] for at in cluster], widest)
            kept = energies(within, within.most)
            costs = [directions * side + prices.core * numbers(directions, ranks) for directions in range(len(kept))]
            done[cluster] = Curve(tuple(kept), tuple(costs))
        return done[cluster]

    found = tuple(dict.fromkeys(clusterings(affinity(products))))
    return Module(found, tuple(tuple(map(curve, clustering)) for clustering in found))


def alone_curve(product: Product, weight: float, side: float) -> Curve:
    """What triples of one adapter keep: its largest singular values."""
    squares = singular_values(product).double().square().cpu().tolist()
    kept = (0.0, *accumulate(weight * square for square in squares))
    return Curve(kept, tuple(side * rank for rank in range(len(kept))))


def numbers(directions: int, ranks: Sequence[int]) -> int:
    """Numbers of the cores in bases of so many directions a side: a core whole, or by factors where they are fewer."""
    return sum(min(directions**2, 2 * directions * min(rank, directions)) for rank in ranks)


@dataclass(frozen=True)
class Plan:
    """What each module gets, and what truncation would give at the same cost."""

    modules: Mapping[str, Module]
    choices: Mapping[str, Choice]
    truncated: Mapping[str, Choice]
    price: float  # the least that a byte, or a parameter, of a triple must keep of ω‖ΔW‖²

    def clusters(self, target: str) -> list[tuple[tuple[int, ...], int]]:
        """The clusters of a module and their directions."""
        choice = self.choices[target]
        return list(zip(self.modules[target].clusterings[choice.clustering], choice.ranks, strict=True))

    @property
    def pays(self) -> bool:
        """Whether any directions are shared."""
        return any(len(cluster) > 1 and rank for target in self.choices for cluster, rank in self.clusters(target))


def plan(modules: Mapping[str, Module], options: CompressOptions, fixed: float) -> Plan:
    """Spend what the options allow; `fixed` is what is kept as it is and costs."""
    targets = list(modules)
    offers = [modules[target].offer for target in targets]
    if options.rank is not None:
        choices, price = at_rank(offers, options.rank)
    elif options.energy is not None:
        whole = sum(curve.kept[-1] for module in modules.values() for curve in module.alone[0])
        choices, price = spend_least(offers, options.energy * whole * (1 - 1e-12))
    else:
        choices, price = spend(offers, options.limit[0] - fixed)
    if not any(any(choice.ranks) for choice in choices):
        raise UsageError(f"{options.rule} is too small: not one direction of any module fits")
    truncated, _ = spend([modules[target].alone for target in targets], cost_of(offers, choices))
    return Plan(modules, dict(zip(targets, choices, strict=True)), dict(zip(targets, truncated, strict=True)), price)


def at_rank(offers: Sequence[Sequence[Sequence[Curve]]], rank: int) -> tuple[list[Choice], float]:
    """Of each module the most that is kept for what bases of a rank cost, and what the last direction keeps for a byte."""
    choices, gain, cost = [], 0.0, 0.0
    for offer in offers:
        together = offer[0]
        ranks = tuple(min(rank, len(curve.kept) - 1) for curve in together)
        literal = Choice(0, ranks)
        (best,), _ = spend([offer], literal.cost(offer))
        choices.append(max(literal, best, key=lambda choice, offer=offer: choice.kept(offer)))  # type: ignore[misc]
        for curve, at in zip(together, ranks, strict=True):
            last = curve.step(at - 1) if at else (0.0, 0.0)
            gain, cost = gain + last[0], cost + last[1]
    return choices, gain / cost if cost else 0.0
