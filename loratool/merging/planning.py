"""Decide a whole merge from headers alone: every edit, every error, the place of every output byte.

A plan is plain data, and making one writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from loratool.adapters.adapter import Adapter
from loratool.adapters.unsettled import settled
from loratool.algebra.updates.additive import Add
from loratool.bases.binding import bind
from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.extra_weights import extras_of
from loratool.bases.packed import Requantizable
from loratool.bases.siblings import served_with
from loratool.bases.side_files import plan_side_files
from loratool.bases.tied_weights import find_ties
from loratool.errors import FitError, InputError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import PROVENANCE
from loratool.files.system import shell_word
from loratool.grouping import by_key
from loratool.merging.components import factors_of, limited
from loratool.merging.draft import Draft, find_changes
from loratool.merging.merge_options import PlanOptions
from loratool.merging.options import GGUF_FLOATS
from loratool.merging.output_layout import (
    OutputChanges,
    ShardPlan,
    check_names,
    plan_indexes,
    plan_shards,
)
from loratool.merging.plan import Plan
from loratool.notes import Note
from loratool.options.shared import other_count
from loratool.templates import listed


def plan_merge(base: Checkpoint, adapters: Sequence[Adapter], options: PlanOptions) -> Plan:
    """Plan `base` + Σ weight · adapter.

    Raises:
        UsageError: the options contradict each other.
        InputError: an adapter uses a feature, or the base a dtype, that is not supported.
        FitError: an adapter tensor matches no weight of the base, or two match the same one.
    """
    base = decoded(base)
    adapters = limited([settled(adapter, base.config) for adapter in adapters], base, options.only)
    check_options(base, options)
    strengths = strengths_of(base, adapters, options)
    binder = partial(bind, maps=options.maps, fan_in_fan_out=options.fan_in_fan_out)
    extras = extras_of(base, adapters, strengths, binder, options.also_load, options.ignore_files)
    adapters, strengths = [*adapters, *extras.loaded], (*strengths, *extras.strengths)
    check_supported(adapters)
    notes = [*base.notes, *(note.under(a.name) for a in adapters for note in a.notes), *extras.notes]
    notes += given_twice(adapters)
    draft = Draft(base, adapters, find_ties(base, adapters), notes, problems=list(extras.problems))
    draft.factors = factors_of(base, options.component_weights, options.block_weights, notes)
    changes = find_changes(draft, strengths, binder, options.allow_new_tensors, extras.problems)
    anew = packed_anew(base, changes) if options.requantize else frozenset[str]()
    plain = becoming_plain(base, changes, anew, options.dequantize, notes)
    kind = (options.gguf_type or "").upper()
    changes = replace(changes, plain=plain, anew=anew, kind=kind, rounding=options.rounding)
    shards = plan_shards(base, changes, options.dtype, options.shard_size)
    files, left_out = plan_side_files(base, adapters, options.dtype, notes, changes.config, plain)
    files |= {index.name: index for index in plan_indexes(base, shards)}
    side_files = tuple(files[name] for name in sorted(files))
    check_names([PROVENANCE, *(s.name for s in shards), *files])
    notes += rounding_notes(shards, options.rounding) + removal_notes(shards)
    packed = {span.packed for shard in shards for span in shard.spans if span.packed}
    naming = (*options.maps, options.fan_in_fan_out, *(a.packing for a in adapters))
    return Plan(
        base=base,
        adapters=tuple(adapters),
        weights=strengths,
        dtype=options.dtype,
        shards=shards,
        side_files=side_files,
        left_out=tuple(left_out),
        notes=tuple(notes),
        naming=naming,
        rounding=options.rounding,
        plain=tuple(sorted(plain - packed)),
        anew=tuple(sorted(packed)),
        accepts_loss=options.accept_loss,
        packed_by=f"--gguf-type {options.gguf_type}" if options.gguf_type else "--requantize",
    )


def check_options(base: Checkpoint, options: PlanOptions) -> None:
    """Raise `UsageError` for options that BASE has no use for, as it is stored, or that are mutually exclusive."""
    kind, gguf, rounds = options.gguf_type, base.is_gguf, options.rounding != "nearest"
    quantised = isinstance(base, Decoded)
    refused = {
        f"{base.name}: --gguf-type is for a GGUF BASE, and this one is not GGUF": kind and not gguf,
        f"{base.name}: --dtype is not for a GGUF BASE; pass --gguf-type for the tensors that change": (
            gguf and options.dtype != "keep"
        ),
        f"{base.name}: --shard-size is not for a GGUF BASE; use llama-gguf-split on the output": (
            gguf and options.shard_size is not None
        ),
        "--gguf-type and --requantize are mutually exclusive": kind and options.requantize,
        f"--gguf-type {kind} rounds to the nearest packed value, so --rounding cannot be used with it": (
            kind and kind not in GGUF_FLOATS and rounds
        ),
        f"{base.name}: --dequantize is for a quantised BASE, and this one is not quantised": (
            options.dequantize and not quantised
        ),
        f"{base.name}: --requantize is for a quantised BASE, and this one is not quantised": (
            options.requantize and not quantised
        ),
        "--requantize and --dequantize are mutually exclusive": options.requantize and options.dequantize,
        "--requantize rounds to the nearest packed value, so --rounding cannot be used with it": (
            options.requantize and rounds
        ),
    }
    for text, holds in refused.items():
        if holds:
            raise UsageError(text)


def rounding_notes(shards: Sequence[ShardPlan], rounding: str) -> list[Note]:
    """A note where another way to round than to the nearest value changes nothing, or nothing of some updates."""
    spans = [span for shard in shards for span in shard.spans if span.edits]
    if rounding != "nearest" and spans and all(span.placed.dtype in ("F32", "F64") for span in spans):
        text = f"--rounding {rounding} changes nothing: no edited tensor is stored in fewer bits than float32"
        return [Note("rounding-unused", text)]
    if rounding != "compensated":
        return []
    edits = [edit for span in spans for edit in span.edits if not edit.update.replaces]
    others = {e.target for e in edits if isinstance(e.update, Add) or not e.update.adds_products}
    text = f"not products of two factors, so rounded to the nearest value: {listed(others)}"
    return [Note("rounded-to-nearest", text)] if others else []


def removal_notes(shards: Sequence[ShardPlan]) -> list[Note]:
    """A note where a negative weight is to take updates out that are other ones for the weight that they are in."""
    edits = (edit for shard in shards for span in shard.spans for edit in span.edits)
    kept = {edit.target for edit in edits if edit.strength < 0 and edit.update.depends_on_weight}
    why = "a negative weight does not take out an update that depends on the weight, such as DoRA's"
    text = f"{listed(kept)}: {why}; use the model from before the merge"
    return [Note("not-taken-out", text)] if kept else []


def packed_anew(base: Checkpoint, changes: OutputChanges) -> frozenset[str]:
    """The edited weights of a base that go back into its format. Raises `InputError` naming those that cannot."""
    weights = base.weights if isinstance(base, Decoded) else {}
    edited = [name for name in changes.edits if name in weights and name not in changes.moved]
    cannot = [f"{printable(n)} ({weights[n].scheme})" for n in edited if not isinstance(weights[n], Requantizable)]
    if cannot:
        way = "leave out --requantize, so that edited weights are written plain"
        raise InputError(f"{base.name}: weights that loratool cannot write in the base's format; {way}:", cannot)
    return frozenset(edited)


def becoming_plain(
    base: Checkpoint, changes: OutputChanges, anew: frozenset[str], everything: bool, notes: list[Note]
) -> frozenset[str]:
    """The packed weights of a base that are plain in the output: those that change, with what is served with them."""
    if not isinstance(base, Decoded):
        return frozenset()
    if everything and (unread := {**base.unread, **base.undescribed}):
        problems = [
            f"{printable(name)}: is packed with {kind}, which loratool does not read" for name, kind in unread.items()
        ]
        raise InputError(f"{base.name}: --dequantize must decode all of BASE, and cannot decode this:", problems)
    if everything:
        return frozenset(base.weights)
    touched = {name for name in (*changes.edits, *changes.moved) if name in base.weights and name not in anew}
    begun = {id(origin.weight) for origin in changes.added}
    touched |= {name for name, weight in base.weights.items() if id(weight) in begun}
    plain = served_with(touched, base.weights)
    if along := sorted(plain - touched):
        text = f"servers fuse these with edited weights, so they become plain as well: {listed(along)}"
        notes.append(Note("siblings-plain", text))
    if also := base.named_too(plain):
        text = (
            f"a list that names edited weights names these, too, so they become plain as well: {listed(sorted(also))}"
        )
        notes.append(Note("siblings-plain", text))
        plain |= also
    notes += base.notes_on(plain)
    return plain


def given_twice(adapters: Sequence[Adapter]) -> Iterator[Note]:
    """That the same file is merged more than once, which is rarely meant."""
    for names in by_key((adapter.file.path, adapter.name) for adapter in adapters).values():
        if (times := len(names)) > 1:
            yield Note("adapter-repeated", f"{names[0]}: given {times} times, so its update is added {times} times")


def strengths_of(base: Checkpoint, adapters: Sequence[Adapter], options: PlanOptions) -> tuple[float, ...]:
    """The weight of each adapter: 1, or what was given for it."""
    weights = options.weights
    if not adapters and options.dequantize and not weights:
        return ()
    if not adapters:
        shown = printable(base.root)
        raise UsageError(
            f"{shown}: a merge needs an ADAPTER as well as a BASE"
            + ("; pass --dequantize to write BASE alone as plain weights" if isinstance(base, Decoded) else ""),
            hint=f"loratool merge {shell_word(shown)} ADAPTER -o OUT",
        )
    if weights and len(weights) != len(adapters):
        raise other_count(weights, len(adapters), "pass one weight per adapter, in order")
    return tuple(weights) or (1.0,) * len(adapters)


def check_supported(adapters: Sequence[Adapter]) -> None:
    """Everything recognised and not merged, of all adapters at once; then everything unrecognised."""
    if missing := [f"{a.name}: {feature}" for a in adapters for feature in a.unsupported]:
        raise InputError("cannot merge these adapters:", missing)
    if unused := [f"{a.name}: {printable(tensor)}" for a in adapters for tensor in a.unused]:
        raise FitError("these adapter tensors were not recognised, so nothing is merged:", unused)
