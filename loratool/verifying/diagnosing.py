"""What is wrong with a merged model as a whole, from what its tensors were found to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from loratool.bases.edits import Edit
from loratool.errors import FitError, printable
from loratool.grouping import by_key
from loratool.merging.plan import Plan
from loratool.results.verify import Diagnosis
from loratool.templates import listed
from loratool.verifying.causes import NOT_MERGED, NOT_MERGED_WORDS, Cause, causes_of, known_causes
from loratool.verifying.distances import Distances
from loratool.verifying.explaining import (
    COARSE,
    ELEMENTS,
    FACTOR,
    GUESS,
    PARAMETERS,
    PART,
    QUANTISED,
    SINGLE,
    UNEXPLAINED,
    Explained,
)
from loratool.verifying.looking import SURE, Fit, pooled
from loratool.verifying.options import RESIDUAL, TWICE
from loratool.verifying.packed import Survived
from loratool.verifying.pairing import Pairing
from loratool.verifying.untouched import Changed
from loratool.verifying.updates import Module

MOST_WORDS = 6  # causes that a sentence tells
MOST_CAUSES = 100  # more than there are
MOST_EQUAL = 0.99  # share of elements: where more are the base's, single elements differ


@dataclass(frozen=True)
class Part:
    """One module of one adapter in one tensor, whose factor is not 1."""

    adapter: int
    target: str
    factor: float
    error: float
    edit: Edit | None  # None where the modules of the tensor are not told apart
    causes: tuple[str, ...] = ()  # codes of those that make the same values; empty where the error tells
    trained: bool = False  # whether it is the factor of what was trained alone


def module_names(names: Iterable[str]) -> tuple[str, ...]:
    """The modules of some tensors."""
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in names))


def counted(names: Sequence[str], noun: str = "module") -> str:
    """`224 modules (model.layers.{0-31}.…)`."""
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} ({listed(names)})"


def of_modules(
    code: str, text: str, tensors: Iterable[str], numbers: Mapping[str, Any] | None = None, passes: bool = False
) -> Diagnosis:
    """A diagnosis that is about the modules that some tensors are of."""
    names = module_names(tensors)
    return Diagnosis(code, f"{counted(names)}: {text}", names, numbers or {}, passes)


def diagnose_edited(
    plan: Plan, found: Mapping[str, Explained], distances: Mapping[str, Distances]
) -> Iterator[Diagnosis]:
    """What is wrong with the tensors that adapters change, but for what nothing known explains."""
    yield from of_factors(plan, found)
    guesses: dict[str, dict[str, list[str]]] = {}
    for name, each in found.items():
        if each.kind == GUESS and each.guess is not None:
            guesses.setdefault(each.guess.code, {}).setdefault(each.guess.words, []).append(name)
    for code, by_words in guesses.items():
        words = next(iter(by_words)) + (f", and {len(by_words) - 1} other ways" if len(by_words) > 1 else "")
        yield of_modules(code, words, chain.from_iterable(by_words.values()))
    if odd := [name for name, each in found.items() if each.kind == ELEMENTS]:
        count, farthest = sum(distances[name].beyond for name in odd), max(distances[name].ulp for name in odd)
        unit = "half steps" if all(found[name].packed for name in odd) else "ulp"
        text = f"off by up to {farthest:.3g} {unit} in {count} single element{'s' * (count != 1)}; all others are the formula's"
        yield of_modules("elements-differ", text, odd, {"elements": count, "ulp": farthest})
    if twice := [name for name, each in found.items() if each.rounding == TWICE and not each.packed]:
        text = "the update was rounded before it was added, as with 16-bit factors"
        yield of_modules("rounded-twice", text, twice, passes=True)
    if before := [name for name, each in found.items() if each.rounding == RESIDUAL]:
        text = (
            "W without the part that the adapter's initialisation subtracted was rounded to "
            f"{plan_dtype(plan, before[0])} before the trained update was added, as PEFT does"
        )
        yield of_modules("residual-rounded", text, before, passes=True)
    if parts := [name for name, each in found.items() if each.kind == PART]:
        most = max(found[name].residual for name in parts)
        text = (
            f"the part that the adapter's initialisation subtracted from W differs by up to {100 * most:.2g} % of its "
            f"size, and nothing else does: PEFT rounds its factors to {plan_dtype(plan, parts[0])} in the adapter that it "
            "converts to LoRA, so pass the adapter that was merged, converted or not"
        )
        yield of_modules("part-rounded", text, parts, {"relative": most})
    if coarse := [name for name, each in found.items() if each.kind == COARSE]:
        farthest = max(distances[name].ulp for name in coarse)
        text = (
            f"lora_A and lora_B were rounded to {plan_dtype(plan, coarse[0])} before they were multiplied; elements are off "
            f"by up to {farthest:.3g} ulp"
        )
        yield of_modules("factors-rounded", text, coarse, {"ulp": farthest})
    if single := [name for name, each in found.items() if each.kind == SINGLE]:
        farthest = max(distances[name].ulp for name in single)
        text = (
            f"off by no more than float32 arithmetic explains, but {farthest:.3g} ulp of float64; probably the update "
            "was computed in float32"
        )
        yield of_modules("computed-in-float32", text, single, {"ulp": farthest})


def rounded_otherwise(asked: str, recognised: str, distances: Mapping[str, Distances]) -> Diagnosis:
    """That a model is exactly what another rounding gives; `distances` are from the one that was asked for."""
    farthest = max(each.ulp for each in distances.values())
    text = f"rounded as by --rounding {recognised}, exactly, so off from --rounding {asked} by up to {farthest:.3g} ulp"
    return of_modules("rounded-otherwise", text, distances, {"ulp": farthest}, passes=farthest <= 1)


def diagnose_quantised(
    pairing: Pairing,
    distances: Mapping[str, Distances],
    left: Mapping[str, Survived],
    found: Mapping[str, Explained],
    changed: Mapping[str, Changed],
) -> Iterator[Diagnosis]:
    """What is quantised in the merged model and plain in the plan: whether it is the nearest, and what survived."""
    if not pairing.quantised:
        return
    schemes = ", ".join(map(printable, dict.fromkeys(pairing.quantised.values())))
    odd = [name for name in pairing.quantised if name in distances and distances[name].unequal]
    failed = {name for name, each in found.items() if each.status == "different"}
    if unknown := [name for name in odd if name in pairing.unpackable]:
        formats = dict.fromkeys(pairing.quantised[name] for name in unknown)
        text = (
            f"quantised ({', '.join(map(printable, formats))}), which loratool reads but does not write, so it cannot tell "
            "whether these are the nearest values to the formula; it can prove a model in which they are plain"
        )
        yield of_modules("quantised-unproven", text, unknown)
    if before := [name for name in odd if not distances[name].beyond and name not in failed]:
        text = f"quantised ({schemes}) from values that were first rounded to 16 bits"
        yield of_modules("rounded-before-packing", text, before, passes=True)
    if far := [name for name in odd if is_of_another_packer(name, found, changed) and name not in pairing.unpackable]:
        count = sum(distances[name].beyond for name in far)
        text = f"quantised ({schemes}), with {count} element{'s' * (count != 1)} farther than half a step of the format from the formula"
        yield of_modules("quantised-differently", text, far, {"elements": count})
    if odd_scales := [name for name, each in found.items() if each.kind == PARAMETERS]:
        own = {tensor: n for name in odd_scales for tensor, n in distances[name].parameters.items()}
        count = sum(own.values())
        text = (
            f"{count} of the scales, zero points and the like ({listed(own)}) {'are' if count > 1 else 'is'} neither the "
            "base's nor that of the merged values, so the values of their groups are lost or off"
        )
        yield of_modules("scales-differ", text, odd_scales, {"parameters": count})
    if left:
        gain = sum(each.gain for each in left.values()) / len(left)
        worst = min(left, key=lambda name: left[name].gain)
        text = (
            f"quantised ({schemes}); {100 * gain:.0f} % of the update survived on average, least in {printable(worst)} with "
            f"{100 * left[worst].gain:.0f} %; the error added is up to {max(each.error for each in left.values()):.2g} of the "
            "update"
        )
        gains = {name: each.gain for name, each in left.items()}
        yield of_modules("quantised", text, left, {"gain": gain, "gains": gains}, passes=True)


def is_of_another_packer(name: str, found: Mapping[str, Explained], changed: Mapping[str, Changed]) -> bool:
    """Whether a quantised tensor is as far from the formula as another method of packing may put it."""
    return found[name].kind == QUANTISED if name in found else name in changed and changed[name].is_noise


def plan_dtype(plan: Plan, name: str) -> str:
    return next(span.placed.dtype for span in plan.edited if span.placed.name == name)


def of_factors(plan: Plan, found: Mapping[str, Explained]) -> Iterator[Diagnosis]:
    """Modules that contain more or less of an update than they should."""
    edits = {(s.placed.name, e.adapter, e.target): e for s in plan.edited for e in s.edits if not e.update.replaces}
    all_of: dict[int, int] = {}
    sound: set[Module] = set()
    odd: list[tuple[str, Module, int, Fit, bool]] = []
    for name, each in found.items():
        for number, module in enumerate(each.modules):
            all_of[module[0]] = all_of.get(module[0], 0) + 1
            if each.kind == FACTOR and each.fit is not None and not each.fit.is_one(number, 0.0):
                odd.append((name, module, number, each.fit, each.trained))
            else:
                sound.add(module)
    parts: dict[int, list[Part]] = {}
    for name, (adapter, target), number, fit, trained in odd:
        shown = target if target and (adapter, target) not in sound else name  # one of several tensors that it changes
        named, edit = fit.causes[number] if fit.causes else (), edits.get((name, adapter, target))
        part = Part(adapter, shown, fit.factors[number], fit.errors[number], edit, named, trained)
        parts.setdefault(adapter, []).append(part)
    for adapter, some in parts.items():
        rslora = plan.adapters[adapter].training.rslora
        groups: dict[tuple[bool, tuple[str, ...]], list[tuple[Part, ...]]] = {}
        for cluster in clusters(some, rslora):
            codes = tuple(dict.fromkeys(cause.code for cause in causes_in(cluster, rslora)))
            groups.setdefault((cluster[0].trained, codes), []).append(cluster)
        for (_, codes), alike in groups.items():
            words = dict.fromkeys(cause.words for cluster in alike for cause in causes_in(cluster, rslora))
            whole = sum(map(len, alike)) == all_of[adapter]
            yield of_factor(plan.adapters[adapter].name, codes, [*words], alike, whole)


def clusters(parts: Sequence[Part], rslora: bool) -> list[tuple[Part, ...]]:
    """Modules in groups of one cause, or of one factor as far as their errors tell; what is known best comes first."""
    found: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (len(part.causes) or MOST_CAUSES, part.error)):
        for cluster in found:
            if belongs(part, cluster, rslora):
                cluster.append(part)
                break
        else:
            found.append([part])
    return [settled(cluster, rslora) for cluster in found]


def belongs(part: Part, cluster: Sequence[Part], rslora: bool) -> bool:
    """Whether a module may have the factor, or one of the causes, of some others."""
    if part.trained != cluster[0].trained:
        return False
    if shared := shared_causes(cluster):
        if part.causes:
            return not shared.isdisjoint(part.causes)
        return any(abs(factor - part.factor) <= SURE * part.error + 1e-6 for factor in factors_of(part, shared, rslora))
    factor, error = factor_of(cluster)
    return not part.causes and abs(part.factor - factor) <= SURE * (part.error + error) + 1e-6


def shared_causes(parts: Sequence[Part]) -> frozenset[str]:
    """The codes of the causes that make the values of all those of some modules that few factors explain."""
    sets = [frozenset(part.causes) for part in parts if part.causes]
    return frozenset.intersection(*sets) if sets else frozenset()


def factors_of(part: Part, codes: Collection[str], rslora: bool) -> list[float]:
    """What some causes give for a module."""
    every = known_causes(part.edit, rslora) if part.edit is not None else ()
    return [cause.factor for cause in every if cause.code in codes]


def settled(cluster: Sequence[Part], rslora: bool) -> tuple[Part, ...]:
    """Modules whose causes are those that they share, each with the factor of one of these that is nearest to its own."""
    if not (shared := shared_causes(cluster)):
        return tuple(cluster)
    found = []
    for part in cluster:
        factors = factors_of(part, shared, rslora)
        nearest = min(factors, key=lambda factor: abs(factor - part.factor), default=part.factor)
        found.append(dataclasses.replace(part, factor=nearest, causes=tuple(shared)))
    return tuple(found)


def factor_of(parts: Sequence[Part]) -> tuple[float, float]:
    """The factor of several modules together, and its standard error."""
    return pooled([part.factor for part in parts], [part.error for part in parts])


def causes_in(cluster: Sequence[Part], rslora: bool) -> list[Cause]:
    """Every cause that gives the factor of some modules, for each of them."""
    if common := shared_causes(cluster):
        edits = [part.edit for part in cluster if part.edit is not None]
        return [cause for edit in edits for cause in known_causes(edit, rslora) if cause.code in common]
    factor, error = factor_of(cluster)
    error = max(error, min(part.error for part in cluster) / 4)
    every = [causes_of(factor, error, part.edit, rslora) for part in cluster if part.edit is not None]
    shared = set.intersection(*({cause.code for cause in causes} for causes in every)) if every else set()
    return [cause for causes in every for cause in causes if cause.code in shared]


def of_factor(
    adapter: str, codes: Sequence[str], words: Sequence[str], alike: Sequence[Sequence[Part]], whole: bool
) -> Diagnosis:
    """One sentence on modules whose factors have the same causes."""
    parts = [part for cluster in alike for part in cluster]
    names = module_names(part.target for part in parts)
    factor, error = factor_of(parts)
    numbers = {"factor": factor, "error": error, "causes": [*codes]}
    if NOT_MERGED in codes:
        others = "".join(f", or {each}" for each in words[:MOST_WORDS] if each != NOT_MERGED_WORDS)
        if whole:
            text = f"{adapter}: not merged into any of its {counted(names)}{others}"
            return Diagnosis(NOT_MERGED, text, names, numbers)
        return Diagnosis("left-out", f"{adapter}: left out of {counted(names)}{others}", names, numbers)
    every = sorted(factor_of(cluster)[0] for cluster in alike)
    shown = f"{factor:.4g}" if len(every) == 1 else f"{every[0]:.4g} to {every[-1]:.4g}"
    why = f": {', or '.join(words[:MOST_WORDS])}" if words else "; no known cause gives that"
    strengths = {part.edit.strength for part in parts if part.edit is not None}
    if whole and not words and len(every) == len(strengths) == 1:  # then all of it may have had another weight
        why = f"; if it was merged with a weight of {factor * strengths.pop():.4g}, pass that with -w"
    of = (
        "update that was trained, and once the part that its initialisation subtracted from W"
        if parts[0].trained
        else "update"
    )
    text = f"{adapter}: {counted(names)} contain{'s' * (len(names) == 1)} {shown} times the {of}{why}"
    return Diagnosis("factor", text, names, numbers)


def diagnose_rest(
    plan: Plan,
    merged: str,
    found: Mapping[str, Explained],
    changed: Mapping[str, Changed],
    untouched: int,
    distances: Mapping[str, Distances],
) -> Iterator[Diagnosis]:
    """What differs without being explained by the adapters: another base, another adapter, or another module merged.

    Raises `FitError` where the adapters are not those that were merged.
    """
    odd = [name for name, each in found.items() if each.kind == UNEXPLAINED]
    besides, few, others = by_kind(changed, untouched, distances)
    every_edited = bool(odd) and len(odd) == len(found)
    if every_edited and not few and not others and not any(has_update(found[name]) for name in odd):
        whose = " + ".join(printable(adapter.name) for adapter in plan.adapters)
        raise FitError(
            f"{printable(merged)} was not made with {whose}: none of the {len(odd)} tensors that should contain its "
            "updates does, and all of them differ from the base's; pass the adapter that was merged"
        )
    most_edited = every_edited or (bool(changed and odd) and len(odd) >= len(found) / 2)
    if most_edited or (bool(others) and len(others) >= untouched / 2):
        yield of_another_base(changed, {name: found[name].residual for name in odd}, untouched, len(found))
        return
    if besides:
        ranks = sorted({changed[name].rank for name in besides})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        if any(changed[name].packed for name in besides):  # some of it is lost in the noise
            shown = "low rank"
        text = f"changed by an update of {shown}, but no adapter has one for it"
        yield of_modules("merged-besides", text, besides, {"ranks": ranks})
    if few:
        count = sum(distances[name].beyond if changed[name].packed else distances[name].unequal for name in few)
        text = f"{count} single element{'s' * (count != 1)} not the base's, though no adapter changes it"
        yield of_modules("elements-differ", text, few, {"elements": count})
    if others:
        yield of_another_base({name: changed[name] for name in others}, {}, untouched, len(found))
    if odd:
        most = max(found[name].residual for name in odd)
        text = f"differ from the formula by up to {most:.2g} of ‖W‖; no known cause gives that"
        yield of_modules("unexplained", text, odd, {"relative": most})


def by_kind(
    changed: Mapping[str, Changed], untouched: int, distances: Mapping[str, Distances]
) -> tuple[list[str], list[str], list[str]]:
    """Tensors that should be the base's: changed by an update of low rank, in single elements, or in another way."""
    besides = [name for name, each in changed.items() if each.is_matrix and each.rank]
    few = [
        name
        for name, each in changed.items()
        if name not in besides
        and (
            (distances[name].near if each.packed else distances[name].equal) > MOST_EQUAL
            or distances[name].unequal == 1
        )
    ]
    if len(few) > max(1, untouched / 2):  # that many are no damage
        few = []
    others = [name for name, each in changed.items() if not each.is_noise and name not in {*besides, *few}]
    return besides, few, others


def of_another_base(
    changed: Mapping[str, Changed], residuals: Mapping[str, float], untouched: int, edited: int
) -> Diagnosis:
    """One sentence on tensors that differ from the base's, and on edited ones, by what is left of their difference."""
    far = max((each.relative for each in changed.values()), default=0.0)
    parts = []
    if changed:
        parts.append(
            f"{len(changed)} of {untouched} tensors that no adapter changes differ from the base's, by up to "
            f"{far:.2g} of their norm ({listed(changed)})"
        )
    if residuals:
        parts.append(
            f"{len(residuals)} of {edited} edited tensors contain changes of up to {max(residuals.values()):.2g} of their "
            "norm that are not the update"
        )
    numbers = {"tensors": len(changed), "of": untouched, "edited": len(residuals), "relative": far}
    names = module_names([*changed, *residuals])
    return Diagnosis("another-base", f"another base: {', and '.join(parts)}", names, numbers)


def has_update(each: Explained) -> bool:
    """Whether an update is in a tensor, as far as its factor tells."""
    return each.fit is not None and any(map(each.fit.has, range(len(each.modules))))


def diagnose_pairing(pairing: Pairing, equal_heads: Mapping[str, bool], tie_changed: bool) -> Iterator[Diagnosis]:
    """What names, shapes and dtypes tell."""
    if pairing.missing:
        names = tuple(pairing.missing)
        yield Diagnosis("missing-tensors", f"{counted(names, 'tensor')} of the base missing", names)
    if pairing.unknown:
        names = tuple(pairing.unknown)
        yield Diagnosis("unknown-tensors", f"{counted(names, 'tensor')} that the base does not have", names)
    for name, (wanted, shape) in pairing.reshaped.items():
        text = f"{printable(name)}: has shape {list(shape)}, not {list(wanted)}"
        yield Diagnosis("shape-differs", text, (name,))
    if pairing.resized:
        names = module_names(pairing.resized)
        sizes = dict.fromkeys(f"{theirs} rows, not {ours}" for ours, theirs in pairing.resized.values())
        text = f"embeddings resized: {counted(names)} with {', '.join(sizes)}; the rows that both have were compared"
        yield Diagnosis("embeddings-resized", text, names)
    for (ours, theirs), tensors in by_key((dtypes, name) for name, dtypes in pairing.dtypes.items()).items():
        text = f"dtype changed: {counted(tensors, 'tensor')} stored as {theirs}, not {ours}; compared as {theirs}"
        yield Diagnosis("dtype-changed", text, tuple(tensors), {"from": ours, "to": theirs})
    if pairing.still_tied:
        text = (
            f"{listed(pairing.still_tied)}: not stored, so it changes with {listed(pairing.still_tied.values())}, which the adapter "
            "changes alone"
        )
        yield Diagnosis("still-tied", text, tuple(pairing.still_tied))
    if pairing.untied:
        same = all(equal_heads.values())
        values = "the same values" if same else "other values"
        text = (
            f"{listed(pairing.untied)}: stored with {values}, but the base ties it to {listed(pairing.untied.values())}"
        )
        yield Diagnosis("tied-weight-untied", text, tuple(pairing.untied), passes=same and not tie_changed)
