"""What each adapter of a merge did to the base: how many of its modules change any element, and how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loratool.files.seen import Seen
from loratool.measuring.large_updates import LARGEST_RATIO, larger
from loratool.merging.plan import Plan
from loratool.merging.totals import effects_in
from loratool.notes import Note
from loratool.results.merge import AdapterEffect
from loratool.templates import listed


def effects_of(plan: Plan, seen: Seen) -> tuple[AdapterEffect, ...]:
    """What each adapter did; a module that it saved whole is one with effect."""
    sources = {id(tensor.file) for span in plan.spans for tensor in span.weight.tensors}
    every, effective, effects = effects_in(plan.edited), {*seen.effective}, []
    for number, (adapter, weight) in enumerate(zip(plan.adapters, plan.weights, strict=True)):
        if weight:
            own = {effect for effect in every if effect[0] == number}
            still = {target for _, target in own - effective}
            modules = len(own) + (id(adapter.file) in sources)
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


def size_notes(plan: Plan, ratios: Mapping[str, float]) -> Iterator[Note]:
    """A note where updates are larger than the matrices that they change; `ratios` are ‖ΔW‖/‖W‖ by tensor."""
    matrices = [span.placed.name for span in plan.edited if len(span.shape) > 1]
    large = {name: ratios[name] for name in matrices if ratios.get(name, 0) > LARGEST_RATIO}
    if large:
        yield Note("update-larger-than-weight", larger(large))
