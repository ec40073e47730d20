"""What became of the modules and adapters of a fleet, for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.writer import factor_tensors
from loratool.files.containers import ENDING
from loratool.lazy import Tensor
from loratool.results.compress import CompressedAdapter, CompressedModule, CompressedTotals
from loratool.reworking.compressing.planning import Fleet, Plan

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """A module that has been worked on."""

    target: str
    shared: tuple[Named, ...]
    own: tuple[tuple[int, Named], ...]  # by adapter
    errors: Mapping[str, tuple[float, float]]  # adapter → ‖ΔW‖² and ‖ΔW − ΔW'‖²


def reported(fleet: Fleet, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Adapters, modules and totals."""
    names = [source.name for source in fleet.sources]
    modules = {target: module_of(fleet, plan, outcomes[target], names) for target in sorted(fleet.targets)}
    adapters = {name: adapter_of(fleet, at, modules, outcomes) for at, name in enumerate(names)}
    shared = sum(tensor.nbytes for outcome in outcomes.values() for _, tensor in outcome.shared)
    live = [one for one in adapters.values() if one.norm]
    totals = CompressedTotals(
        bytes_before=sum(one.bytes_before for one in adapters.values()),
        bytes_shared=shared,
        bytes=shared + sum(one.bytes for one in adapters.values()),
        error=mean_square([one.error for one in live]),
        truncated=mean_square([one.truncated for one in live]),
        pays=plan.pays,
        price=plan.price,
    )
    return {"totals": totals, "adapters": adapters, "modules": modules}


def module_of(fleet: Fleet, plan: Plan, outcome: Outcome, names: Sequence[str]) -> CompressedModule:
    """A module: its clusters, and the errors of its adapters next to those of truncation."""
    own = [names[aligned.adapter] for aligned in fleet.layers[outcome.target]]
    curves, ranks = plan.modules[outcome.target].alone[0], plan.truncated[outcome.target].ranks
    cut = {
        name: math.sqrt(max(0.0, 1 - curve.kept[rank] / curve.kept[-1])) if curve.kept[-1] else 0.0
        for name, curve, rank in zip(own, curves, ranks, strict=True)
    }
    clusters = plan.clusters(outcome.target)
    return CompressedModule(
        clusters=tuple(tuple(own[at] for at in cluster) for cluster, _ in clusters),
        directions=tuple(count for _, count in clusters),
        errors={name: math.sqrt(lost / whole) if whole else 0.0 for name, (whole, lost) in outcome.errors.items()},
        truncated=cut,
    )


def adapter_of(
    fleet: Fleet, at: int, modules: Mapping[str, CompressedModule], outcomes: Mapping[str, Outcome]
) -> CompressedAdapter:
    """An adapter, all of its modules together."""
    source = fleet.sources[at]
    name = source.name
    squares = {target: outcomes[target].errors[name][0] for target in modules if name in modules[target].errors}
    errors = {target: modules[target].errors[name] for target in squares}
    whole = math.fsum(squares.values())
    lost, cut = (
        math.fsum(squared * side[target] ** 2 for target, squared in squares.items())
        for side in (errors, {target: modules[target].truncated[name] for target in squares})
    )
    worst = max(errors, key=errors.__getitem__, default="")
    stored = {tensor.info for layer in source.layers.values() for tensor in factor_tensors(layer)}
    return CompressedAdapter(
        file=name + ENDING,
        bytes_before=sum(info.nbytes for info in stored),
        bytes=sum(tensor.nbytes for outcome in outcomes.values() for of, (_, tensor) in outcome.own if of == at),
        norm=math.sqrt(whole),
        error=math.sqrt(lost / whole) if whole else 0.0,
        truncated=math.sqrt(cut / whole) if whole else 0.0,
        worst=worst,
        worst_error=errors.get(worst, 0.0),
    )


def mean_square(errors: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors)) if errors else 0.0
