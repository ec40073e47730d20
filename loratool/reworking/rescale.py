"""`rescale()`: an adapter at another strength, by its α, or baked into its factors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import LARGEST_SCALE, Adapter, is_zero, stored_tensors
from loratool.adapters.blocks import BlockWeights
from loratool.adapters.formats import format_of, read_adapter
from loratool.adapters.formats.format import Parts, Restated, Spelling
from loratool.adapters.layers import ROUNDING_ONLY, Contents, Form, Layer, contents_of
from loratool.adapters.patterns import search_names
from loratool.adapters.ranks import evened
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.unsettled import as_stored, settled
from loratool.adapters.writer import (
    FactorOptions,
    Output,
    carried_over,
    check_adapter_target,
    copied_output,
    files_beside,
    kept_dtype,
    restated_output,
    scaled_output,
    told_beside,
)
from loratool.algebra.lowrank.noise import floor_of
from loratool.algebra.lowrank.products import padded, singular_values
from loratool.arguments import PathLike, Progress
from loratool.errors import BAKE, FitError, InputError, UsageError, printable
from loratool.fetching import local
from loratool.measuring.session import Session, copying, hashing, session
from loratool.notes import Note
from loratool.options.described import FLAG, Number, Pairs, option
from loratool.options.shared import BlockOption
from loratool.options.writing import PublishOptions
from loratool.results.rescale import RescaledLayer, RescaleReport
from loratool.reworking.dialects import BASE_UNUSED, Manner, OutputDialect, in_manner
from loratool.reworking.runner import Draft, Made, Maker, Rest, record_of, run

EVEN = 1e-9  # factors that differ by less are one


@dataclass(frozen=True, kw_only=True)
class RescaleOptions(BlockOption, FactorOptions, OutputDialect, ReadingOptions, PublishOptions):
    """Of `rescale`."""

    scale: float | None = option(help="Multiply every update by this.", kind=Number(zero=False))
    alpha: float | None = option(help="Set alpha of every module.", kind=Number(zero=False))
    frobenius: float | None = option(
        help="Scale all updates so that their total Frobenius norm is NORM.", kind=Number(above=0), metavar="NORM"
    )
    spectral: float | None = option(
        help="Scale all updates so that their largest singular value is NORM.", kind=Number(above=0), metavar="NORM"
    )
    each: bool = option(
        help="With --frobenius or --spectral: scale each module separately to NORM.", default=False, kind=FLAG
    )
    match: tuple[str, ...] = option(
        help="Multiply modules whose name contains a match of REGEX by FACTOR; may be repeated, the first match wins.",
        default=(),
        kind=Pairs(),
        many=True,
    )
    bake: bool = option(
        help="Multiply the scaling into the factors and write alpha = r, without rsLoRA or alpha_pattern.",
        default=False,
        kind=FLAG,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_needed("each", "frobenius", "spectral")

    @property
    def asked(self) -> dict[str, float]:
        """The strengths that are given, by the names of their options."""
        every = {name: getattr(self, name) for name in ("scale", "alpha", "frobenius", "spectral")}
        return {name: value for name, value in every.items() if value is not None}


def rescale(
    adapter: PathLike, out: PathLike, options: RescaleOptions, progress: Progress | None = None
) -> RescaleReport:
    """Write the adapter at another strength; `loratool.commands.rescale` says all of it."""
    started = time.monotonic()
    alpha, frobenius = options.alpha, options.frobenius
    factors = {name: float(number) for name, _, number in (pair.rpartition("=") for pair in options.match)}
    blocks = BlockWeights.of(options.block_weights)
    check(options, factors, blocks)
    path = local(adapter, "adapter")
    contents, manner, bake = opened(path, options)
    target = check_adapter_target(out, [path], options, manner.form)
    if not contents.layers and not (contents.changes and manner.form.rescales_tensors):
        raise InputError(f"{printable(contents.adapter.file.path)}: contains no update whose strength can be changed")
    if options.dtype != "keep" and not bake:
        raise UsageError(
            "--dtype needs --bake, without which alpha changes and the tensors stay the same", hint="--bake"
        )
    changes = dict.fromkeys(contents.changes, options.scale or 1.0)
    contents, asleep = awakened(contents, alpha) if alpha is not None else (contents, frozenset[str]())
    computes = bake or frobenius is not None or options.spectral is not None
    with session("cpu", [contents]) if computes else copying(hashing([contents])) as at_work:
        norm: float | None = None
        rounded: list[str] = []
        if frobenius is not None or options.spectral is not None:
            sizes, noise = measured(contents, at_work, frobenius is None, progress)
            wanted = factors_to(contents, sizes, noise, options)
            rounded = [t for t in contents.layers if options.each and sizes[t] <= noise[t]]
        elif alpha is not None:
            wanted = {t: alpha / own for t, own in format_of(contents.adapter).alphas(contents).items()}
        else:
            wanted = dict.fromkeys(contents.layers, options.scale or 1.0)
        matched = by_name(factors, blocks, contents.layers)
        modules = {
            t: RescaledLayer(layer.scale, layer.scale * f, f)
            for t, layer in contents.layers.items()
            for f in [wanted[t] * matched[t]]
        }
        alphas = {t: abs(m.after) * max(contents.layers[t].rank, 1) for t, m in modules.items()}
        if huge := [t for t, value in alphas.items() if not bake and not value <= LARGEST_SCALE]:
            raise UsageError("alpha would overflow float32:", map(printable, huge))
        if frobenius is not None:
            norm = math.sqrt(math.fsum((sizes[t] * m.after / m.before) ** 2 for t, m in modules.items() if m.before))
        told = {t: RescaledLayer(0.0, m.after, None) if t in asleep else m for t, m in modules.items()}
        notes = (*remarks(contents, told, bake, rounded, len(changes) * (options.scale is None)), *manner.notes)
        if bake:
            own = {t: layer.rank for t, layer in contents.layers.items()}
            notes += (*manner.form.rank_notes(own, ranks_of(contents, manner)),)
        facts = {"adapter": at_work.origins[0], "asked": options.asked, "match": factors, "bake": bake}
        if bake:
            run(Baker(contents, manner, modules, at_work, options, facts, notes, changes), target, [path], options)
        else:
            record = record_of("rescale", [path], options, facts, notes)
            write_alphas(target, contents, modules, options, record, changes)
    return RescaleReport(
        out=target,
        written=not options.dry_run,
        baked=bake,
        modules=dict(sorted(told.items())),
        norm=norm,
        notes=notes,
        changes=changes,
        **at_work.told(started),
    )


def opened(path: Path, options: RescaleOptions) -> tuple[Contents, Manner, bool]:
    """An adapter, how it is written, and whether its factors are written anew.

    They are not where its strength alone is: in one number for all layers, in tensors of its own, or in a config. What PEFT
    does not read as it is packed, or becomes another dialect, is written anew.
    """
    (way,) = options.readings(1)
    base = options.model()
    read = read_adapter(path, way)
    as_it_is = Manner(format_of(read), "", notes=(BASE_UNUSED,) if base is not None else ())
    if restates(read, options):
        return contents_of(as_stored(read), "rescale"), as_it_is, False
    given = settled(read, base.config if base else {})
    contents = contents_of(given, "rescale", as_products=bool(given.dialects))
    if as_it_is.form.rescales_tensors and not options.bake and options.to is None:
        return replace(contents, adapter=given), as_it_is, False  # LoHa and LoKr stay what they are
    anew = bool(options.bake or options.to or contents.adapter.packing)
    if as_it_is.form.config_name and not anew:
        return contents, as_it_is, False
    (contents,), manner = in_manner([contents], options.to, base)
    return contents, manner, anew or not manner.form.config_name


def is_even(options: RescaleOptions) -> bool:
    """Whether all layers get one factor that does not depend on how a dialect divides them, and nothing else is to change."""
    others = (options.bake, options.to, options.spectral, options.match, options.block_weights)
    return not any(others) and not options.each


def restates(adapter: Adapter, options: RescaleOptions) -> bool:
    """Whether an adapter gets another α where it has one for all layers."""
    return is_even(options) and format_of(adapter).restated(adapter, 1.0) is not None


def check(options: RescaleOptions, factors: Mapping[str, float], blocks: BlockWeights) -> None:
    """Raise `UsageError` where the arguments do not mean one thing."""
    if len(options.asked) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in options.asked)} are mutually exclusive")
    if not (options.asked or factors or blocks.factors or options.bake):
        raise UsageError(
            "nothing to do: pass --scale, --alpha, --frobenius, --spectral, --match, --block-weights or --bake"
        )


def by_name(factors: Mapping[str, float], blocks: BlockWeights, layers: Mapping[str, Layer]) -> dict[str, float]:
    """Target → the factor of the first pattern that is found in its module's name, times that of its block.

    Raises `UsageError` for a pattern that is found nowhere.
    """
    blocks.check(layers)
    modules = {target: layer.module for target, layer in layers.items()}
    try:
        matching = search_names(factors, modules.values())
    except ValueError as error:
        raise UsageError(f"--match: {error}") from None
    if idle := [pattern for pattern in factors if not any(pattern in found for found in matching.values())]:
        raise UsageError(
            f"--match: no adapted module matches {', '.join(map(printable, idle))}; adapted modules are named like "
            f"{printable(next(iter(modules.values())))}"
        )
    return {
        target: blocks.factor(target) * next((f for pattern, f in factors.items() if pattern in matching[module]), 1.0)
        for target, module in modules.items()
    }


def measured(
    contents: Contents, at_work: Session, spectral: bool, progress: Progress | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The Frobenius norm of each update, or its largest singular value, and what of it may be rounding; experts together."""

    def work(target: str) -> list[tuple[str, tuple[float, float]]]:
        found = contents.load(target, at_work.device, at_work.dtype)
        values, rounding = singular_values(found), floor_of(found)
        if spectral:
            return [(target, (float(values.max()), float(rounding.max())))]
        return [(target, (float(values.square().sum().sqrt()), float(rounding.square().sum().sqrt())))]

    found = dict(at_work.through(work, contents.layers, len(contents.layers), progress))
    return {target: size for target, (size, _) in found.items()}, {t: rounding for t, (_, rounding) in found.items()}


def factors_to(
    contents: Contents, sizes: Mapping[str, float], noise: Mapping[str, float], options: RescaleOptions
) -> dict[str, float]:
    """The factor of each layer that brings the norms to what was asked for: 1 where an update is zero, or rounding."""
    ((kind, wanted),) = options.asked.items()

    def whole(parts: Mapping[str, float]) -> float:
        return math.hypot(*parts.values()) if kind == "frobenius" else max(parts.values())

    if whole(sizes) <= whole(noise):
        raise FitError(
            f"cannot scale it to a norm: every update is zero (an untrained adapter has B = 0) or {ROUNDING_ONLY}; if "
            "only alpha is 0, pass --alpha"
        )
    if options.each:
        return {target: wanted / size if size > noise[target] else 1.0 for target, size in sizes.items()}
    return dict.fromkeys(contents.layers, wanted / whole(sizes))


def awakened(contents: Contents, alpha: float) -> tuple[Contents, frozenset[str]]:
    """The contents with `alpha` for the layers whose α is 0, which no factor changes, and those layers.

    Raises `FitError` where all factors of these are zero too, so that no α gives the adapter any strength.
    """
    asleep = {t: layer for t, layer in contents.layers.items() if layer.scale == 0}
    if not asleep:
        return contents, frozenset()
    if len(asleep) == len(contents.layers) and not any(map(is_trained, asleep.values())):
        raise FitError(
            f"{printable(contents.adapter.file.path)}: alpha is 0 and so is all of B, so changing alpha has no effect"
        )
    divisors = format_of(contents.adapter).divisors(contents)
    layers = {t: layer.with_alpha(alpha, divisors[t]) for t, layer in asleep.items()}
    return replace(contents, layers={**contents.layers, **layers}), frozenset(asleep)


def is_trained(layer: Layer) -> bool:
    """Whether neither of its factors is all zero; their values are read for it."""
    return all(any(not is_zero(tensor) for tensor in stored_tensors(factor)) for factor in layer.factors)


def write_alphas(
    out: Path,
    contents: Contents,
    modules: Mapping[str, RescaledLayer],
    options: RescaleOptions,
    provenance: Mapping[str, Any],
    changes: Mapping[str, float],
) -> None:
    """The same tensors under another α; one α for all gives up the patterns that there were."""
    factors = {target: layer.factor for target, layer in modules.items()}
    form = format_of(contents.adapter)
    if form.rescales_tensors:
        strengths = {**{t: f if f is not None else 1.0 for t, f in factors.items()}, **changes}
        scaled = form.scaled(contents, strengths, {t: m.after for t, m in modules.items()})
        scaled_output(out, contents, scaled, provenance, options)
        return
    if restates(contents.adapter, options):
        restated_output(out, contents, with_one_alpha(contents, factors), provenance, options)
        return
    config = form.rescaled(contents, factors, options.alpha is not None)
    if options.dry_run:
        contents.adapter.check_values()
    else:
        copied_output(out, contents, config, provenance, options)


def with_one_alpha(contents: Contents, factors: Mapping[str, float | None]) -> Restated:
    """Its one α at another strength. Raises `InputError` where its layers would need several."""
    form, known = format_of(contents.adapter), [factor for factor in factors.values() if factor is not None]
    made = form.restated(contents.adapter, known[0]) if max(known) - min(known) <= EVEN * abs(known[0]) else None
    if made is None:
        raise InputError(f"{form.name} has one alpha for all layers, and these need several; pass --bake", hint=BAKE)
    return made


def ranks_of(contents: Contents, manner: Manner) -> dict[str, int]:
    """The ranks of its layers, one for those to which the format gives one."""
    own = {target: layer.rank for target, layer in contents.layers.items()}
    return evened(own, names_of(contents, manner).of_one_rank())


def names_of(contents: Contents, manner: Manner) -> Spelling:
    """How its layers are written."""
    return manner.spelling({t: layer.kind for t, layer in contents.layers.items()}, contents)


@dataclass
class Baker(Maker[str, None]):
    """Puts the strength into the factors: B takes it, A stays as it is."""

    command = "rescale"

    contents: Contents
    manner: Manner
    modules: Mapping[str, RescaledLayer]
    at_work: Session
    options: RescaleOptions
    facts: Mapping[str, Any]
    notes: tuple[Note, ...]
    changes: Mapping[str, float]  # target of a change that is stored in full → what multiplies it

    def draft(self) -> Draft:
        names, ranks = names_of(self.contents, self.manner), ranks_of(self.contents, self.manner)
        forms = {t: Form.of(layer, ranks[t]) for t, layer in self.contents.layers.items()}
        self.said = {} if self.options.bake else names.scales({t: m.after for t, m in self.modules.items()})
        said = self.said if names.scales_biases else {}
        factors = {t: (m.factor or 1.0) / (said.get(t) or 1.0) for t, m in self.modules.items()}
        carried = carried_over(self.contents, names, {**factors, **self.changes})
        dtype = kept_dtype([self.contents], self.options.dtype)
        return replace(self.manner.draft(forms, names, dtype, carried, [self.contents]), scales=self.said)

    def tasks(self) -> Iterable[str]:
        return self.modules

    def work(self, output: Output, task: str) -> list[Made[None]]:
        found = self.contents.load(task, self.at_work.device, self.at_work.dtype)
        factor = (self.modules[task].factor or 1.0) / (
            self.said.get(task) or 1.0
        )  # what the output does not say itself
        rounded = output.rounded(task, padded(found.scaled(factor), output.forms[task].rank))
        if bool(found.up.any()) and not bool(rounded.factors.up.any()):
            raise FitError(f"{printable(task)}: all of B would be zero in {output.dtype}")
        return [Made((rounded,), None)]

    def rest(self, draft: Draft) -> Rest:
        parts = Parts(
            ranks_of(self.contents, self.manner),
            self.said,
            dora=self.contents.dora,
            lora_bias=bool(self.contents.biases),
            tokens=draft.carried.tokens,
        )
        adapter = self.contents.adapter
        config = draft.names.describe([adapter], parts)
        return Rest(config, self.facts, self.notes, files_beside(self.contents), [adapter.folder])


def remarks(
    contents: Contents, modules: Mapping[str, RescaledLayer], baked: bool, rounded: Sequence[str], unscaled: int
) -> Iterator[Note]:
    """What a user of the result should know; layers that are `rounded` got no norm of their own."""
    if rounded:
        yield Note(
            "update-is-rounding",
            f"{len(rounded)} of {len(modules)} updates keep their strength, such as {printable(rounded[0])}: each is "
            f"zero, or {ROUNDING_ONLY}, which scaling it to a norm would amplify",
        )
    if contents.adapter.packing:
        yield Note(
            "factors-repacked",
            f"its factors are {contents.adapter.packing}, which PEFT cannot read; they are rewritten as PEFT packs "
            "them, with the strength in the factors as with --bake",
        )
    changed = any(m.factor != 1 for m in modules.values())
    if contents.dora and changed:
        yield Note(
            "dora-direction-only",
            "DoRA: W' = m ⊙ (W + sBA)/‖W + sBA‖, so a scale changes the direction of each row but not its length m, and "
            "the effect is not proportional. For a proportional change use `loratool merge -w`",
        )
    whole = len(contents.saved) + len(contents.bases) + len(contents.rows) + unscaled
    if whole and changed:
        yield Note(
            "no-strength",
            f"tensors saved whole or as token rows have no scaling and stay unchanged ({whole})",
        )
    if asleep := sum(m.factor is None for m in modules.values()):
        yield Note("alpha-was-zero", f"{asleep} layers had an alpha of 0 and had no effect")
    if still := sum(m.before == m.after == 0 for m in modules.values()):
        yield Note(
            "alpha-is-zero", f"{still} layers have an alpha of 0, which a factor cannot change; pass --alpha to set it"
        )
    if any(m.factor is not None and m.factor < 0 for m in modules.values()):
        yield Note("negative-factor", "a negative factor inverts the updates: the adapter now does the opposite")
    yield from contents.remarks if baked else contents.adapter.notes
    yield from told_beside(contents)
