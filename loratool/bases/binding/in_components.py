"""Binding in an image or video model, whose components are each bound as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.bases.binding.components import components_of
from loratool.bases.binding.distributing import distribute
from loratool.bases.binding.in_model import bind_model, mapped_of, without_rivals
from loratool.bases.binding.places import Bound
from loratool.bases.binding.resolving import Renaming
from loratool.files.checkpoint import Checkpoint


def bind_components(
    adapter: Adapter, base: Checkpoint, renamings: Sequence[Renaming], fan_in_fan_out: bool | None
) -> Bound:
    """Bind the targets of each component in it; those that a `--map` renames, and those of no component, in the base."""
    if not (parts := components_of(base)):
        return bind_model(adapter, base, renamings, fan_in_fan_out)
    mapped = mapped_of(adapter.updates, renamings)
    meant = [part for part in parts if adapter.component in part.words] or parts
    spread = distribute([t for t in adapter.updates if t not in mapped], meant, base.tensors)
    bound = Bound({}, spread.reasons)
    own = {target: target for target in (*mapped, *spread.rest)}
    shares = [("", own, bind_model(portion_of(adapter, own), base, renamings, fan_in_fan_out))] if own else []
    for part in parts:
        if share := spread.shares.get(part.prefix):
            found = bind_model(portion_of(adapter, share), part.model, (), fan_in_fan_out, part)
            shares.append((part.prefix, share, replace(found, notes=tuple(n.under(part.shown) for n in found.notes))))
    for prefix, share, found in shares:
        bound = joined(bound, found, prefix, share)
    places, problems = without_rivals(bound.places, bound.problems)
    ordered = {target: places[target] for target in adapter.updates if target in places}
    return replace(bound, places=ordered, problems={t: problems[t] for t in sorted(problems)})


def portion_of(adapter: Adapter, share: Mapping[str, str]) -> Adapter:
    """The adapter with some of its updates, under other names."""
    optional = frozenset(name for name, target in share.items() if target in adapter.optional)
    return replace(adapter, updates={n: adapter.updates[t] for n, t in share.items()}, optional=optional)


def joined(bound: Bound, found: Bound, prefix: str, share: Mapping[str, str]) -> Bound:
    """`bound` with what was found in a component, whose names stand behind `prefix` in the base."""
    places = {
        share[name]: tuple(replace(place, tensor=prefix + place.tensor) for place in every)
        for name, every in found.places.items()
    }
    return Bound(
        {**bound.places, **places},
        {**bound.problems, **{share[name]: why for name, why in found.problems.items()}},
        (*bound.notes, *found.notes),
        {**bound.missing, **{share[name]: kind for name, kind in found.missing.items()}},
        bound.proposed | {share[name] for name in found.proposed},
    )
