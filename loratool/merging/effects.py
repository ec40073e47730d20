"""What each adapter of a merge did to the base: how many of its modules change any element, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.measuring.delta_statistics import LARGEST_RATIO, larger
from loratool.notes import Note
from loratool.results.merge import AdapterEffect
from loratool.templates import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratool.merging.plan import MergePlan
    from loratool.merging.totals import Totals


def effects_of(plan: MergePlan, totals: Totals) -> tuple[AdapterEffect, ...]:
    """What each adapter did, as far as its updates were looked at; a module that it saved whole is one with effect."""
    sources = {id(tensor.file) for span in plan.spans for tensor in span.weight.tensors}
    effects = []
    for number, (adapter, weight) in enumerate(zip(plan.adapters, plan.weights, strict=True)):
        if weight:
            looked_at = {target for which, target in totals.measured if which == number}
            still = {target for which, target in totals.measured - totals.effective if which == number}
            modules = len(looked_at) + (id(adapter.file) in sources)
        else:
            still, modules = set(adapter.updates), len(adapter.updates)
        effects.append(AdapterEffect(adapter.name, weight, modules, tuple(sorted(still))))
    return tuple(effects)


def effect_notes(effects: Sequence[AdapterEffect]) -> Iterator[Note]:
    """What is to be said of adapters that change nothing, or not all that they update."""
    for effect in effects:
        if effect.dead:
            text = (
                f"changes no element of the base in any of its {effect.modules} modules: its weight, its alpha or its "
                "B is 0, or the change is lost in rounding"
            )
            yield Note("adapter-without-effect", text).under(effect.name)
        elif effect.unchanged:
            text = f"{len(effect.unchanged)} of {effect.modules} modules change no element: {listed(effect.unchanged)}"
            yield Note("modules-without-effect", text).under(effect.name)


def size_notes(plan: MergePlan, ratios: Mapping[str, float]) -> Iterator[Note]:
    """A note where updates are larger than the matrices that they change; `ratios` are ‖ΔW‖/‖W‖ by tensor."""
    matrices = [span.placed.name for span in plan.edited if len(span.shape) > 1]
    large = {name: ratios[name] for name in matrices if ratios.get(name, 0) > LARGEST_RATIO}
    if large:
        yield Note("update-larger-than-weight", larger(large))


LEAST_GAIN = 0.9  # less than this of an update is worth a warning


@dataclass(frozen=True)
class Gains:
    """The part of an update that rounding leaves: ⟨W' − W, ΔW⟩ / ‖ΔW‖², on sampled rows."""

    total: float | None  # of all that was sampled; None where nothing was
    modules: dict[str, float]

    @classmethod
    def of(cls, kept: Mapping[str, tuple[float, float]]) -> Gains:
        """From both numbers of every module."""
        products, squares = sum(one for one, _ in kept.values()), sum(other for _, other in kept.values())
        modules = {name: product / squared for name, (product, squared) in kept.items() if squared}
        return cls(products / squares if squares else None, modules)


def gain_notes(plan: MergePlan, gains: Gains) -> Iterator[Note]:
    """A warning where rounding takes much of the update away."""
    low = {module: gain for module, gain in gains.modules.items() if gain < LEAST_GAIN}
    if low and gains.total is not None:
        way = "--dtype float32" if plan.rounding == "compensated" else "--rounding compensated, or --dtype float32,"
        text = (
            f"rounding keeps {100 * gains.total:.0f} % of the update in all, and less than {100 * LEAST_GAIN:.0f} % in "
            f"{len(low)} of {len(gains.modules)} modules: {listed(low)}; pass {way} to keep it"
        )
        yield Note("update-lost-in-rounding", text)
