"""A merged model held to what its base and adapters give: everything is compared, and what differs is explained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from loratool.adapters.adapter import same_bytes
from loratool.arguments import PathLike, Progress, several
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.packed import Requantizable
from loratool.bases.weights import plain_of
from loratool.devices import Awaited
from loratool.errors import FitError, printable
from loratool.fetching import check_there, local
from loratool.fetching.bases import AUTO as AUTO_BASE
from loratool.files.checkpoint import Checkpoint
from loratool.files.process import on_all_cores
from loratool.files.safefile import TensorInfo
from loratool.layouts.ties import TIE_FLAGS
from loratool.merging.inputs import opened_inputs, planned
from loratool.merging.merge_options import PlanOptions
from loratool.merging.options import GGUF_FLOATS, ROUNDINGS
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan
from loratool.merging.planning import check_options
from loratool.merging.shared_updates import SharedUpdates
from loratool.notes import Note
from loratool.options.described import described_by
from loratool.results.base import Cost
from loratool.results.verify import NOT_PROVEN, PROVEN, ROUNDED_TWICE, Diagnosis, TensorProof, Verification
from loratool.verifying.configs import compare_files, keys_of
from loratool.verifying.diagnosing import (
    diagnose_edited,
    diagnose_pairing,
    diagnose_quantised,
    diagnose_rest,
    rounded_otherwise,
)
from loratool.verifying.distances import Distances
from loratool.verifying.explaining import Explained, as_it_should, explain, single_elements
from loratool.verifying.halves import in_halves
from loratool.verifying.looking import Look
from loratool.verifying.options import AUTO, RESIDUAL, TWICE, VerifyOptions
from loratool.verifying.packed import Survived, explain_packed, survived
from loratool.verifying.pairing import Pair, Pairing, pair
from loratool.verifying.proving import Proving
from loratool.verifying.quantised import is_quantised
from loratool.verifying.untouched import Changed, look_at

MOST_TRIED = 3  # of the smallest tensors that differ, by which a way to round is recognised
TELLING = 256  # elements: several ways to round may give all of fewer by chance
MOSTLY = 0.98  # share of elements that are what a way to round gives, but for what float32 takes from a decomposition
MOST_LOOKED_AT = (
    512  # tensors that differ and are looked at a second time; a model of many experts has tens of thousands
)


def verifier_of(
    merged: PathLike,
    base: PathLike | None,
    adapters: Sequence[PathLike] | PathLike,
    options: VerifyOptions,
    progress: Progress | None,
) -> Verifier:
    """What holds `merged` to `base` and `adapters`."""
    check_there(merged)
    base, paths = AUTO_BASE if base is None else base, several(adapters)
    plan, model = plan_of(base, paths, options), decoded(open_checkpoint(local(merged, "model")))
    if keeps_packed(plan) and not isinstance(model, Decoded):
        plan = plan_of(base, paths, dataclasses.replace(options, dequantize=True))
        text = f"{printable(model.name)} has no quantised weights, so it is compared with a merge with --dequantize"
        plan = dataclasses.replace(plan, notes=(*plan.notes, Note("taken-as-dequantized", text)))
    return Verifier(plan, model, options, progress)


def keeps_packed(plan: Plan) -> bool:
    """Whether weights stay as they are packed in the base."""
    packed = plan.base.packed if isinstance(plan.base, Decoded) else {}
    return any(span.carried is not None and span.placed.name in packed for span in plan.spans)


def plan_of(base: PathLike, adapters: Sequence[PathLike], options: VerifyOptions) -> Plan:
    """What the merge would have been. Raises `FitError` in one sentence where an adapter is of another model."""
    settings = {name: getattr(options, name) for name in described_by(PlanOptions) if hasattr(options, name)}
    settings["rounding"] = options.rounding if options.rounding not in (AUTO, TWICE) else "nearest"
    if options.gguf_type not in GGUF_FLOATS:  # packed tensors are recognised as what they are
        settings["gguf_type"] = None
    try:
        model, read, _ = opened_inputs(base, adapters, options)
        plan = planned(model, read, PlanOptions(**settings))
        check_options(plan.base, PlanOptions(gguf_type=options.gguf_type))
        return plan
    except FitError as error:
        if not error.problems:
            raise
        more = f", and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        raise FitError(f"{error.message.rstrip(':')}: {error.problems[0]}{more}") from None


class Verifier:
    """One merged model and the plan that it is held to."""

    known: Mapping[str, Distances] | None = None  # of every tensor, where they have been measured before
    otherwise: Diagnosis | None = None  # that the model is rounded in another way than it is said to be

    def __init__(self, plan: Plan, merged: Checkpoint, options: VerifyOptions, progress: Progress | None) -> None:
        self.plan, self.merged, self.options, self.progress = plan, merged, options, progress
        self.pairing: Pairing = pair(plan, merged)
        self.runtime = Awaited(options.device)
        self.bytes_read = 0

    def check(self) -> list[Note]:
        """Notes on packed weights that tools decode differently.

        Raises `InputError` where an adapter has values that are no numbers, or packed weights cannot be decoded.
        """
        for adapter in self.plan.adapters:
            adapter.check_values()
        notes = self.plan.check_packed(self.plan.spans)
        if isinstance(self.merged, Decoded):
            notes += self.merged.check(each.name for each in self.pairing.pairs if is_quantised(each.theirs))
        return notes

    def run(self, started: float) -> Verification:
        """Compare everything, look again at what differs, and say what it is; the work began at that second."""
        doubts = self.check()
        rounding, distances = self.prove_all()
        odd = [each for each in self.pairing.pairs if not each.span.edits and is_off(each, distances[each.name])]
        odd, distances = self.decoded(odd, distances)
        found = self.explain_all(self.pairing.edited, distances, rounding)
        diagnoses, notes = self.diagnose(found, self.look_at_all(odd), distances)
        tensors = self.proofs(found, distances)
        twice = any(proof.status == "rounded-twice" for proof in tensors.values())
        wrong = any(not each.passes for each in diagnoses) or any(p.status == "different" for p in tensors.values())
        ready = self.runtime.used()
        return Verification(
            merged=self.merged.root,
            verdict=NOT_PROVEN if wrong else ROUNDED_TWICE if twice else PROVEN,
            diagnoses=tuple(diagnoses),
            notes=(*doubts, *notes),
            base=self.plan.base.name,
            adapters=tuple(adapter.name for adapter in self.plan.adapters),
            rounding=rounding_of(found.values(), rounding),
            tensors=tensors,
            bytes_read=self.bytes_read,
            cost=Cost.since(started, ", ".join(ready.devices), ready.seconds),
        )

    def prove_all(self) -> tuple[str, dict[str, Distances]]:
        """How every tensor was rounded, and how far it is from the formula rounded that way."""
        rounding, asked = self.rounding, self.options.rounding
        distances = dict(self.known) if self.known is not None else self.prove(self.pairing.pairs, rounding)
        edited = self.pairing.edited
        odd = [each for each in edited if distances[each.name].equal < 0.995 and not is_quantised(each.theirs)]
        odd.sort(key=lambda each: (each.span.placed.elements < TELLING, each.span.placed.nbytes))
        for other in ROUNDINGS if odd and asked != TWICE else ():
            if other != rounding and self.is_rounded(odd[:MOST_TRIED], other, distances):
                if asked != AUTO:
                    self.otherwise = rounded_otherwise(asked, other, {each.name: distances[each.name] for each in odd})
                return other, {**distances, **self.prove(edited, other)}
        if asked != AUTO:
            return rounding, distances
        halves = [each for each in odd if each.span.placed.dtype in ("BF16", "F16") and in_halves(each.span.edits)]
        some = self.prove([each for each in halves if distances[each.name].ulp > 1][:MOST_TRIED], RESIDUAL)
        if any(each.ulp <= 1 and each.equal >= MOSTLY for each in some.values()):
            found = self.prove(halves, RESIDUAL)
            better = {name: one for name, one in found.items() if one.beyond <= distances[name].beyond}
            return RESIDUAL, {**distances, **better}
        return AUTO, distances

    def is_rounded(self, some: Sequence[Pair], rounding: str, before: Mapping[str, Distances]) -> bool:
        """Whether tensors are rounded in some way, by their distances and those `before`: most, for one may be damaged."""
        found = self.prove(some, rounding)
        fewer = {name for name, each in found.items() if each.unequal < before[name].unequal}
        return 2 * sum(not found[name].unequal or single_elements(found[name]) for name in fewer) >= len(some)

    @property
    def rounding(self) -> str:
        """How the model is taken to be rounded before anything is known of it."""
        return "nearest" if self.options.rounding == AUTO else self.options.rounding

    def prove(self, pairs: Sequence[Pair], rounding: str) -> dict[str, Distances]:
        """Compare some tensors with the formula."""
        proving = Proving(pairs, self.runtime, self.options, rounding, self.progress)
        proving.run()
        self.bytes_read += proving.bytes_done
        return proving.distances

    def explain_all(
        self, edited: Sequence[Pair], distances: Mapping[str, Distances], rounding: str
    ) -> dict[str, Explained]:
        """What each edited tensor is; of very many that differ, only some are looked at."""
        odd = [each for each in edited if is_odd(distances[each.name])]
        some, shared = odd[:: max(1, -(-len(odd) // MOST_LOOKED_AT))], SharedUpdates()

        def look(each: Pair) -> Explained:
            if is_quantised(each.theirs):
                return explain_packed(each, distances[each.name], self.plan, shared)
            return explain(each, distances[each.name], self.plan, rounding, shared)

        found = {each.name: one for each, one in zip(some, on_all_cores(look, some), strict=True)}
        found |= {each.name: as_it_should(each, rounding) for each in edited if not is_odd(distances[each.name])}
        return {each.name: found[each.name] for each in edited if each.name in found}

    def decoded(
        self, odd: Sequence[Pair], distances: Mapping[str, Distances]
    ) -> tuple[list[Pair], dict[str, Distances]]:
        """Pairs that differ, those of packed values and their scales as the weights that they make, with distances."""
        base, merged = self.plan.base, self.merged
        if not isinstance(base, Decoded) or not isinstance(merged, Decoded):
            return [*odd], {**distances}
        weights: dict[str, Pair] = {}
        for each in odd:
            name, _ = base.packed.get(each.name, ("", False))
            ours, theirs = base.weights.get(name), merged.weights.get(name)
            if ours is not None and isinstance(theirs, Requantizable) and ours.shape == theirs.shape:
                span = Span(ours, TensorInfo(name, "F32", ours.shape, 0, 4 * math.prod(ours.shape)))
                weights[each.name] = Pair(span, theirs, span.rows)
        seen = self.prove([*{pair.name: pair for pair in weights.values()}.values()], "nearest")
        different = {part: pair for part, pair in weights.items() if seen[pair.name].unequal}
        rest = [each for each in odd if each.name not in different]
        return [*rest, *{pair.name: pair for pair in different.values()}.values()], {**distances, **seen}

    def look_at_all(self, odd: Sequence[Pair]) -> dict[str, Changed]:
        """How the tensors differ that should be the base's."""
        found = {each.name: one for each, one in zip(odd, on_all_cores(look_at, odd), strict=True)}
        copied = [name for name, one in found.items() if one.is_noise and name not in self.pairing.quantised]
        return {**found, **{name: dataclasses.replace(found[name], is_noise=False) for name in copied}}

    def left_of_updates(self, found: Mapping[str, Explained]) -> dict[str, Survived]:
        """What survived of the updates of each quantised tensor."""
        packed = [each for each in self.pairing.pairs if each.name in self.pairing.quantised and each.name in found]
        results = zip(packed, on_all_cores(lambda each: survived(Look(each, ())), packed), strict=True)
        return {each.name: left for each, left in results if left is not None}

    def diagnose(
        self, found: Mapping[str, Explained], changed: Mapping[str, Changed], distances: Mapping[str, Distances]
    ) -> tuple[list[Diagnosis], list[Note]]:
        """All that is wrong, and all that should be known."""
        pairing, plan = self.pairing, self.plan
        heads = {
            name: same_bytes(plain_of(self.merged, name), plain_of(self.merged, first))
            for name, first in pairing.untied.items()
        }
        tie_changed = any(self.merged.config.get(key) is False for key in TIE_FLAGS)
        small = list(compare_files(plan, self.merged, keys_of(pairing)))
        edited = len(pairing.edited)
        untouched = len(pairing.pairs) - edited
        diagnoses = [
            *([self.otherwise] if self.otherwise else []),
            *diagnose_edited(plan, found, distances),
            *diagnose_rest(plan, self.merged.name, found, changed, untouched, distances),
            *diagnose_quantised(pairing, distances, self.left_of_updates(found), found, changed),
            *diagnose_pairing(pairing, heads, tie_changed),
            *(each for each in small if isinstance(each, Diagnosis)),
        ]
        to_write = ("config-edit", *(["siblings-plain"] if pairing.quantised else []))  # what a merge would write
        notes = [note for note in plan.notes if note.code not in to_write]
        notes += [each for each in small if isinstance(each, Note)]
        if len(found) < edited:
            text = f"of {edited} edited tensors, {edited - len(found)} that differ were not looked at a second time"
            notes.append(Note("looked-at-some", text))
        if pairing.buffers:
            text = f"on one side only, and rebuilt whenever a model is loaded: {len(pairing.buffers)} buffers"
            notes.append(Note("buffers-differ", text))
        if pairing.tied:
            text = f"not stored, because tied to another tensor: {', '.join(map(printable, pairing.tied))}"
            notes.append(Note("tied-weight-left-out", text))
        return diagnoses, notes

    def proofs(self, found: Mapping[str, Explained], distances: Mapping[str, Distances]) -> dict[str, TensorProof]:
        """What each tensor is, in the order of the plan."""
        proofs: dict[str, TensorProof] = {}
        adapters, twice = len(self.plan.adapters), any(each.rounding == TWICE for each in found.values())
        for each in self.pairing.pairs:
            seen = distances[each.name]
            if each.name in found:
                proofs[each.name] = found[each.name].proof(seen, adapters)
            else:
                proofs[each.name] = TensorProof(status_of(each, seen, twice), seen.ulp, seen.equal)
        gone = {**dict.fromkeys(self.pairing.missing, "missing"), **dict.fromkeys(self.pairing.unknown, "unknown")}
        return proofs | {name: TensorProof(status) for name, status in gone.items()}


def is_odd(seen: Distances) -> bool:
    """Whether any element of an edited tensor, or any of its parameters, is not what it should be."""
    return bool(seen.unequal or seen.parameters)


def is_off(pair: Pair, seen: Distances) -> bool:
    """Whether a tensor that should be the base's is another one, as far as its format tells."""
    if is_quantised(pair.theirs):
        return isinstance(pair.theirs, Requantizable) and bool(seen.beyond)
    return bool(seen.unequal)


def status_of(pair: Pair, seen: Distances, twice: bool) -> str:
    """What a tensor is by its distances alone; `twice` tells whether others like it were rounded twice."""
    if not pair.span.edits:
        passes = is_quantised(pair.theirs) and not seen.beyond
        return "identical" if not seen.unequal else "rounded-twice" if passes else "different"
    return "proven" if seen.ulp <= 1 else "rounded-twice" if twice and seen.ulp <= 2 else "different"


def rounding_of(found: Iterable[Explained], rounding: str) -> str:
    """The one way in which all edited tensors are rounded; empty where they differ or are something else."""
    if rounding != AUTO:
        return rounding
    every = {each.rounding for each in found}
    return TWICE if every == {TWICE, "nearest"} else every.pop() if len(every) == 1 else ""
