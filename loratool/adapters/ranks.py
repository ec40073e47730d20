"""Which rank each layer gets: by a fixed number, by what is lost, or by what all layers may have together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.adapters.layers import Layer
from loratool.adapters.patterns import match_patterns
from loratool.errors import UsageError, printable
from loratool.notes import Note
from loratool.options.described import Kind, amount

AMOUNT = "a number of parameters such as 4M, or of bytes such as 16MB"
RULES = ("rank", "energy", "error", "ratio", "cumulative", "budget")


@dataclass(frozen=True)
class Amount(Kind):
    """A number of parameters (4M) or of bytes (16MB)."""

    metavar = "SIZE"

    annotation = "int | str"

    def taken(self, value: Any, flag: str) -> Any:
        if (amount(str(value)) or (0.0, False))[0] < 1:
            raise UsageError(f"{flag} {printable(value)}: must be {AMOUNT}")
        return str(value)


@dataclass(frozen=True)
class RankRule:
    """One way to choose ranks. Energies are squares of singular values, of a layer's experts added up."""

    kind: str  # one of RULES
    number: float
    in_bytes: bool = False  # a budget of bytes, not of numbers
    weights: Mapping[str, float] = field(default_factory=dict)  # pattern → how much the error of a layer counts
    uniform: bool = False

    @classmethod
    def of(
        cls,
        asked: Mapping[str, float | str | None],
        weights: Mapping[str, float] | None = None,
        uniform: bool = False,
    ) -> RankRule:
        """The rule that was asked for, of `RULES`; raises `UsageError` where that is none, or several."""
        given = {kind: value for kind in RULES if (value := asked.get(kind)) is not None}
        if len(given) != 1:
            said = " and ".join(f"--{kind}" for kind in given) or "none"
            raise UsageError(f"pass exactly one of {', '.join(f'--{kind}' for kind in RULES)} (got {said})")
        ((kind, value),) = given.items()
        if kind == "budget":
            number, in_bytes = amount(str(value)) or (math.nan, False)
        else:
            number, in_bytes = float(value), False
        if kind == "error" and number >= 1:
            raise UsageError(f"--error {printable(value)}: must be a relative error in [0, 1)")
        if weights and kind != "budget":
            raise UsageError("--layer-weights needs --budget")
        if bad := [pattern for pattern, weight in (weights or {}).items() if not is_weight(weight)]:
            raise UsageError(f"the weight of {printable(bad[0])} must be a number of at least 0")
        return cls(kind, number, in_bytes, dict(weights or {}), uniform)

    @property
    def needs_values(self) -> bool:
        """Whether ranks depend on singular values."""
        return self.kind != "rank"

    def choose(
        self,
        layers: Mapping[str, Layer],
        energies: Mapping[str, Sequence[float]],
        itemsize: int,
        groups: Sequence[tuple[str, ...]] = (),
    ) -> dict[str, int]:
        """The rank of each layer, 0 for one that a budget leaves nothing; a budget gives those of a group one rank.

        `itemsize` is that of the stored factors. A rank that was asked for is cut to what the layer's shape allows.
        """
        if self.kind == "rank":
            ranks = {target: min(int(self.number), layer.most) for target, layer in layers.items()}
        elif self.kind == "budget":
            ranks = self.spend(layers, energies, itemsize, groups)
        else:
            ranks = {target: max(1, self.enough(energies[target])) for target in layers}
        if self.uniform:
            most = int(self.number) if self.kind == "rank" else max(ranks.values())
            if self.kind == "budget":
                each = sum(layers[t].parameters for t, rank in ranks.items() if rank) * (
                    itemsize if self.in_bytes else 1
                )
                most = min(most, int(self.number // each))
            ranks = {target: most if rank else 0 for target, rank in ranks.items()}
        return ranks

    def enough(self, energies: Sequence[float]) -> int:
        """The smallest rank that keeps to the rule."""
        if self.kind == "ratio":
            return sum(value > energies[0] / self.number**2 for value in energies)
        if self.kind == "cumulative":
            energies = [math.sqrt(value) for value in energies]
        total = math.fsum(energies)
        allowed = (self.number**2 if self.kind == "error" else 1 - self.number) * total
        lost, rank = 0.0, len(energies)
        while rank and lost + energies[rank - 1] <= allowed * (1 + 1e-12):
            rank -= 1
            lost += energies[rank]
        return rank

    def spend(
        self,
        layers: Mapping[str, Layer],
        energies: Mapping[str, Sequence[float]],
        itemsize: int,
        groups: Sequence[tuple[str, ...]] = (),
    ) -> dict[str, int]:
        """Ranks where they keep most for their cost: one sort over all singular values of all layers."""
        weights = self.weights_of(layers)
        costs = {target: layer.parameters * (itemsize if self.in_bytes else 1) for target, layer in layers.items()}
        worth = {t: [weights[t] * energy for energy in values] for t, values in energies.items()}
        for first, *others in groups:  # of one rank: bought together
            every = [worth[first], *(worth.pop(other) for other in others)]
            worth[first] = [math.fsum(values) for values in itertools.zip_longest(*every, fillvalue=0.0)]
            costs[first] += sum(costs.pop(other) for other in others)
        items = sorted(
            (
                (-energy / costs[target], target, at)
                for target, values in worth.items()
                for at, energy in enumerate(values)
                if energy > 0
            ),
        )
        ranks = dict.fromkeys(layers, 0)
        left, full = self.number, set[str]()
        for _, target, at in items:
            if target in full:
                continue
            if costs[target] > left:
                full.add(target)  # its later ones are worth less still
                continue
            left -= costs[target]
            ranks[target] = at + 1
        ranks = evened(ranks, groups)
        if not any(ranks.values()):
            raise UsageError(
                f"--{self.told} is too small: even rank 1 of the smallest layer takes "
                f"{min(costs.values())}{' bytes' if self.in_bytes else ' parameters'}"
            )
        return ranks

    def weights_of(self, layers: Mapping[str, Layer]) -> dict[str, float]:
        """How much each layer counts: the first pattern that matches it, else 1."""
        found = by_pattern(self.weights, layers, "--layer-weights")
        return {target: found.get(target, 1.0) for target in layers}

    @property
    def told(self) -> str:
        """The rule in words, for reports and provenance."""
        unit = (" bytes" if self.in_bytes else " parameters") if self.kind == "budget" else ""
        return f"{self.kind} {self.number:g}{unit}" + (", uniform" if self.uniform else "")


def evened(ranks: Mapping[str, int], groups: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """The same ranks, but within each group the largest for all."""
    return {**ranks, **{target: max(ranks[t] for t in group) for group in groups for target in group}}


def told_of_cuts(asked: int | None, limits: Mapping[str, int], targets: Collection[str]) -> Iterator[Note]:
    """What to say where the rank that was `asked` for is more than some layers can have."""
    cut = [target for target in targets if asked is not None and limits.get(target, asked) < asked]
    if cut:
        yield Note(
            "rank-cut",
            f"rank {asked} is too large for {len(cut)} of {len(targets)} layers, which get the largest that their shape "
            f"allows, such as {limits[cut[0]]} for {printable(cut[0])}",
        )


def is_weight(value: object) -> bool:
    """Whether it is a number from 0 on; a table from a file may hold anything."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def by_pattern(table: Mapping[str, float], layers: Mapping[str, Layer], what: str) -> dict[str, float]:
    """Target → the value of the first pattern that matches its module, as PEFT matches its patterns.

    Raises `UsageError` for a pattern that is no regular expression, or that matches nothing.
    """
    modules = {target: layer.module for target, layer in layers.items()}
    try:
        matching = match_patterns(table, modules.values())
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from None
    if idle := set(table) - set[str]().union(*matching.values()):
        raise UsageError(f"{what}: patterns that match no adapted module: {', '.join(sorted(map(printable, idle)))}")
    return {
        target: next(value for pattern, value in table.items() if pattern in matching[module])
        for target, module in modules.items()
        if matching[module]
    }
