"""Which tensor of the base, or which rows of one, a target means.

Decided from names and shapes on disk and from the tables of `layouts`: `resolving` finds the tensors (`flattened` those
of names without dots), `fusing` the rows of them, `orientation` which way round they are stored; `checking` looks at
all of it together, and `telling` puts it in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter, adds_zero
from loratool.adapters.unsettled import Unsettled, open_question
from loratool.algebra.updates.base import Update
from loratool.bases.binding.aliases import match_of
from loratool.bases.binding.checking import found_otherwise, holes, overlap, rivals, uncut
from loratool.bases.binding.components import Component, components_of
from loratool.bases.binding.distributing import distribute
from loratool.bases.binding.flattened import look_up
from loratool.bases.binding.fusing import Misfit
from loratool.bases.binding.orientation import Orientation, module_of
from loratool.bases.binding.places import ALL, Bound, Match, Place, Rule
from loratool.bases.binding.proposing import proposals
from loratool.bases.binding.resolving import Renaming, Resolver
from loratool.bases.binding.telling import Nearest, tell
from loratool.errors import FitError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import NUMBERED
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.notes import Note
from loratool.templates import fill, grouped, listed, template_of

__all__ = ["ALL", "Bound", "Place", "bind", "fill", "grouped", "listed", "overlap", "read_maps", "tell", "template_of"]


def bind(adapter: Adapter, base: Checkpoint, *, maps: Sequence[str] = (), fan_in_fan_out: bool | None = None) -> Bound:
    """Find the place of every target of `adapter`, from the names and shapes of the base's tensors alone.

    Args:
        adapter: its updates are fitted here to how the base stores its weights.
        base: only its headers and its config are looked at.
        maps: `REGEX=TEMPLATE` each; the first whose pattern is found in a target's name gives it another name.
        fan_in_fan_out: whether square weights that may be Conv1D are stored (in, out); by default the class of
            the model decides, then the config of the adapter.

    Raises:
        FitError: the adapter is of another kind of model than the base.
    """
    if base.is_gguf:
        from loratool.bases.binding.named import named

        if (view := named(base)) is not None:
            return view.in_file(bind(adapter, view, maps=maps, fan_in_fan_out=fan_in_fan_out))
    renamings = read_maps(maps)
    if parts := components_of(base):
        bound = bind_components(adapter, base, parts, renamings, fan_in_fan_out)
    else:
        bound = bind_model(adapter, base, renamings, fan_in_fan_out)
    if bound.problems:
        from loratool.bases.binding.unlike import unlike_kinds  # which knows many models

        if why := unlike_kinds(adapter, base, parts):
            raise FitError(f"{adapter.name}: {why}")
    notes = list(bound.notes)
    mapped = mapped_of(adapter.updates, renamings)
    for text, (pattern, _) in zip(maps, renamings, strict=True):
        if not any(map(pattern.search, mapped)):
            notes.append(
                Note(
                    "map-unused",
                    f"--map {printable(repr(text))} matches no weight name of this adapter; names are matched without PEFT's prefix",
                )
            )
    template_of.cache_clear()
    return replace(bound, notes=tuple(notes))


def mapped_of(targets: Iterable[str], renamings: Sequence[Renaming]) -> set[str]:
    """The targets whose name a `--map` matches."""
    return {t for t in targets for pattern, _ in renamings if pattern.search(t)}


def bind_components(
    adapter: Adapter,
    base: Checkpoint,
    parts: Sequence[Component],
    renamings: Sequence[Renaming],
    fan_in_fan_out: bool | None,
) -> Bound:
    """Bind the targets of each component in it; those that a `--map` renames, and those of no component, in the base."""
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


def without_rivals(
    places: Mapping[str, tuple[Place, ...]], problems: Mapping[str, str]
) -> tuple[Mapping[str, tuple[Place, ...]], dict[str, str]]:
    """Places and problems, where a target that edits what another one does is a problem."""
    taken = {
        target: f"{printable(tensor)} is already edited by {printable(other)}"
        for target, (tensor, other) in rivals(places).items()
    }
    return {target: every for target, every in places.items() if target not in taken}, {**problems, **taken}


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
            if part is not None and (pieces := part.aliases.names.get(target)) and target not in base.tensors:
                matches[target] = match_of(pieces, update, base.tensors, Rule(("other-layout", part.layout)))
            else:
                matches[target] = resolver.match(target, update, renamings)
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


TIED = {"output head": "the base has no such weight and does not tie its head to an input embedding"}


def read_maps(maps: Iterable[str]) -> list[Renaming]:
    """`REGEX=TEMPLATE` texts as patterns and replacements; the last `=` divides them."""
    found: list[Renaming] = []
    for text in maps:
        pattern, divided, replacement = text.rpartition("=")
        try:
            if not divided or not pattern:
                raise re.error("the '=' is missing" if not divided else "the pattern is empty")
            expression = re.compile(pattern)
            re.compile(f"{pattern}|").sub(replacement, "")  # a template of groups that the pattern has not
            found.append((expression, replacement))
        except (re.error, IndexError) as error:
            raise UsageError(f"--map {printable(repr(text))}: expected REGEX=TEMPLATE: {printable(error)}") from None
    return found


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
