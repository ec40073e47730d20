"""Binding in a model of one kind, or in one component of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter, adds_zero
from loratool.adapters.unsettled import Unsettled, open_question
from loratool.algebra.updates.base import Update
from loratool.bases.binding.checking import found_otherwise, holes, rivals, uncut
from loratool.bases.binding.flattened import look_up
from loratool.bases.binding.fusing import Misfit
from loratool.bases.binding.orientation import Orientation, module_of
from loratool.bases.binding.places import Bound, Match, Place
from loratool.bases.binding.proposing import proposals
from loratool.bases.binding.resolving import Renaming, Resolver
from loratool.bases.binding.telling import Nearest
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import NUMBERED
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.notes import Note

if TYPE_CHECKING:
    from loratool.bases.binding.components import Component  # which knows many models

TIED = {"output head": "the base has no such weight and does not tie its head to an input embedding"}


def bind_model(
    adapter: Adapter,
    base: Checkpoint,
    renamings: Sequence[Renaming],
    fan_in_fan_out: bool | None,
    part: Component | None = None,
) -> Bound:
    """The same in a model of one kind, or in one `part` of a model."""
    mapped = mapped_of(adapter.updates, renamings)
    names, reasons = look_up([t for t in adapter.updates if t not in mapped], base.tensors)
    own = {name: target for target, name in names.items()}
    adapter = replace(
        adapter,
        updates={names.get(t, t): update for t, update in adapter.updates.items()},
        optional=frozenset(names.get(t, t) for t in adapter.optional),
    )
    resolver = Resolver(base)
    reasons |= {
        t: open_question(update, base.config) for t, update in adapter.updates.items() if isinstance(update, Unsettled)
    }
    matches: dict[str, Match] = {}
    for target, update in adapter.updates.items():
        if target in reasons:
            continue
        try:
            alias = part.match(target, update) if part is not None else None
            matches[target] = alias or resolver.match(target, update, renamings)
        except Misfit as misfit:
            # a combined adapter has zeros for the biases of layers without one
            if str(misfit) or not (target in adapter.optional or adds_zero(update)):
                reasons[target] = str(misfit)
    notes = by_suffix(resolver, adapter, matches, reasons)
    placed = settle(adapter, base, matches, fan_in_fan_out, reasons, notes)
    places, reasons = without_rivals(placed, reasons)
    missing = {t: kind for t in reasons if not reasons[t] and (kind := kind_of(t))}
    elsewhere = in_another_shard(base)
    near = Nearest(resolver.disk.templates, base.tensors)
    lost = {t: adapter.updates[t] for t, why in reasons.items() if not why}
    taken = {place.tensor for every in places.values() for place in every}
    # a --map is for whole names, and those of a component are without the beginning
    proposed = proposals(lost, places, resolver.disk, taken) if part is None else {}
    problems = {
        own.get(t, t): reasons[t]
        or elsewhere
        or (not proposed.get(t) and TIED.get(missing.get(t, "")))
        or near.reason(t, proposed.get(t, ""))
        for t in sorted(reasons)
    }
    notes += [*found_otherwise(places), *holes(adapter, places, base.tensors)]
    named = {own.get(t, t): places[t] for t in adapter.updates if t in places}
    return Bound(named, problems, tuple(notes), missing, frozenset(proposed))


def in_another_shard(base: Checkpoint) -> str:
    """Why a base that is one of several shards lacks a weight; empty for a whole model."""
    count = int(match["count"]) if (match := NUMBERED.match(base.root.name)) and not base.root.is_dir() else 1
    return f"BASE is one of {count} shards and lacks this weight; pass the folder of all shards" if count > 1 else ""


def mapped_of(targets: Iterable[str], renamings: Sequence[Renaming]) -> set[str]:
    """The targets whose name a `--map` matches."""
    return {t for t in targets for pattern, _ in renamings if pattern.search(t)}


def without_rivals(
    places: Mapping[str, tuple[Place, ...]], problems: Mapping[str, str]
) -> tuple[Mapping[str, tuple[Place, ...]], dict[str, str]]:
    """Places and problems, where a target that edits what another one does is a problem."""
    taken = {
        target: f"{printable(tensor)} is already edited by {printable(other)}"
        for target, (tensor, other) in rivals(places).items()
    }
    return {target: every for target, every in places.items() if target not in taken}, {**problems, **taken}


def by_suffix(resolver: Resolver, adapter: Adapter, matches: dict[str, Match], reasons: dict[str, str]) -> list[Note]:
    """The last resort for targets with no trace in the base; what it finds is told as a note."""
    lost: dict[str, Update] = {t: adapter.updates[t] for t, why in reasons.items() if not why and not kind_of(t)}
    if all(update.replaces for update in lost.values()):
        return []  # a head of the adapter's own, whose name may end as some other's does
    found, change = resolver.by_suffix(lost)
    matches |= found
    for target in found:
        del reasons[target]
    if not found:
        return []
    return [
        Note(
            "suffix-match",
            f"{len(found)} names match only by their endings, with the prefix {printable(change)}; check the plan "
            "with --dry-run",
        )
    ]


def settle(
    adapter: Adapter,
    base: Checkpoint,
    matches: dict[str, Match],
    fan_in_fan_out: bool | None,
    reasons: dict[str, str],
    notes: list[Note],
) -> dict[str, tuple[Place, ...]]:
    """The places of every match the way round that its weight is stored; what cannot be goes to `reasons`."""
    orientation = Orientation(adapter, base, fan_in_fan_out)
    orientation.watch(matches)
    places: dict[str, tuple[Place, ...]] = {}
    for target, match in matches.items():
        turned = orientation.decide(target, match)
        if isinstance(turned, str):
            reasons[target] = turned
            continue
        chosen = match.turned if turned else match.straight
        if why := uncut(chosen):
            reasons[target] = f"{why} ({printable(chosen[0].tensor)}: {chosen[0].rule})"
            continue
        places[target] = chosen
    notes += orientation.notes()
    return places


def kind_of(target: str) -> str:
    """What a target is by its module's name: an "input embedding", an "output head", or neither."""
    module = module_of(target)
    if module in OUTPUT_HEADS:
        return "output head"
    return "input embedding" if module in INPUT_EMBEDDINGS else ""
