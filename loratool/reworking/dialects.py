"""In which dialect a command writes an adapter that it makes of others: that of the first, unless another is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from loratool.adapters.adapter import Derived
from loratool.adapters.formats import DIALECTS, WRITTEN, format_of
from loratool.adapters.formats.format import Format, Spelling
from loratool.adapters.layers import Contents, Form, Kind, Layer
from loratool.adapters.writer import Carried
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.experts import ExpertFactors
from loratool.bases.opening import open_checkpoint
from loratool.errors import FitError, InputError, printable
from loratool.fetching import local
from loratool.files.checkpoint import Checkpoint
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.options.described import Choice, Options, PathKind, option
from loratool.reworking.converting.naming import hint_of, respelled
from loratool.reworking.converting.rows import Target
from loratool.reworking.runner import Draft

# Dialects that are read and not written → one that their tools read.
NEAREST: Mapping[str, str] = {
    "musubi": "kohya",
    "onetrainer": "kohya",
    "wan-fun": "kohya",
    "ai-toolkit": "diffusers",
    "cloneofsimo": "diffusers",
    "simpletuner": "diffusers",
    "xlabs": "comfy",
    "bfl": "comfy",
    "original": "comfy",
}


@dataclass(frozen=True, kw_only=True)
class DialectOption(Options):
    """Of a command that makes adapters of adapters."""

    to: str | None = option(
        help="Dialect of OUT, as for `loratool convert` [default: that of the first adapter; for `extract` diffusers' "
        "of a pipeline, else PEFT's].",
        kind=Choice(lambda: tuple(DIALECTS)),
    )


@dataclass(frozen=True)
class Manner:
    """The dialect in which an adapter is written."""

    form: Format
    dialect: str
    architecture: str = ""
    notes: tuple[Note, ...] = ()

    def spelling(self, kinds: Mapping[str, Kind], source: Contents) -> Spelling:
        """How layers are written that come from an adapter."""
        release = source.training.release if self.form is format_of(source.adapter) else ""
        return self.form.spelling(kinds, release, self.dialect)

    def draft(
        self,
        forms: Mapping[str, Form],
        names: Spelling,
        dtype: torch.dtype,
        carried: Carried,
        sources: Sequence[Contents],
    ) -> Draft:
        """What is written of layers whose scale is in their factors."""
        adapters = [source.adapter for source in sources]
        return Draft(forms, names, dtype, carried, sources=adapters, architecture=self.architecture)


@dataclass(frozen=True, kw_only=True)
class OutputDialect(DialectOption):
    """Of a command whose adapters may be those of a model that the dialect of OUT depends on."""

    base: str | None = option(
        help="Base model of the adapters, whose config decides names and rows in some dialects (gguf, torchtune).",
        kind=PathKind("BASE"),
    )

    def model(self) -> Checkpoint | None:
        """The base; None where none is given."""
        return open_checkpoint(local(self.base, "model")) if self.base is not None else None


def dialect_of(source: Contents) -> str:
    """The dialect of an adapter, or one that the same tools read; empty where it is not written."""
    own = next(iter(source.adapter.dialects or format_of(source.adapter).dialects), "")
    found = NEAREST.get(own, own)
    return found if found in DIALECTS else ""


def manner_of(source: Contents, asked: str | None, config: Mapping[str, Any]) -> Manner:
    """The dialect that is asked for, else that of an adapter, else PEFT's.

    Raises `InputError` where the one that is asked for takes a model with another config.
    """
    if asked is not None:
        return Manner(DIALECTS[asked].for_model(config), asked)
    own = next(iter(source.adapter.dialects), source.adapter.format)
    plain, why = Manner(WRITTEN, WRITTEN.dialects[0]), "which is read and not written"
    if dialect := dialect_of(source):
        with suppress(InputError):
            manner = Manner(DIALECTS[dialect].for_model(config), dialect)
            manner.form.spelling({}, dialect=dialect)
            if dialect == own:
                return manner
            text = f"the output is in the dialect {dialect}, as {own} is read and not written"
            return replace(manner, notes=(Note("layout-changed", text),))
        why = "which takes the model to write (pass --base)"
    text = f"the output is in PEFT's layout; {source.name} is in that of {own}, {why}"
    return replace(plain, notes=(Note("layout-changed", text),))


def in_manner(
    sources: Sequence[Contents], asked: str | None, base: Checkpoint | None = None
) -> tuple[list[Contents], Manner]:
    """Adapters with their layers as one dialect has them, so that they can be compared and written.

    Raises `FitError` where that dialect cannot express one of them.
    """
    manner = manner_of(sources[0], asked, base.config if base is not None else {})
    form, dialect = manner.form, manner.dialect
    found: list[Contents] = []
    for source in sources:
        own = {target: layer.magnitude or layer.update for target, layer in source.layers.items()}
        plain = replace(source.adapter, updates={**source.adapter.updates, **own})
        if lost := form.losses(plain, dialect) if source.adapter.format != form.name or asked else ():
            raise FitError(
                f"{printable(source.adapter.file.path)}: {dialect} cannot express all of it:", [x.text for x in lost]
            )
        if source.adapter.dialects == (dialect,):
            found.append(source)
            continue
        wanted = respelled(source.layers, dialect, manner.architecture, hint_of(source), base)
        manner = replace(manner, architecture=wanted.architecture, notes=(*manner.notes, *wanted.notes))
        found.append(renamed(source, wanted.targets))
    return found, manner


def renamed(source: Contents, targets: Mapping[str, Target]) -> Contents:
    """An adapter with the layers that a dialect has; factors of those that are joined or cut are made when they are loaded."""
    layers = {name: as_layer(name, target, source.layers) for name, target in targets.items()}
    moved = {target.sources[0]: name for name, target in targets.items() if target.is_whole(source.layers)}
    if torn := [t for t, layer in source.layers.items() if t not in moved and layer.magnitude]:
        raise FitError("DoRA of layers that this dialect divides otherwise cannot be written:", map(printable, torn))
    biases = {}
    for target, bias in source.biases.items():
        weight = f"{target.removesuffix('bias')}weight"
        name = moved.get(weight, weight)
        biases[f"{name.removesuffix('weight')}bias"] = bias
    return replace(source, layers=layers, biases=biases)


def as_layer(name: str, target: Target, layers: Mapping[str, Layer]) -> Layer:
    """A layer of a dialect, its factors still on disk; those of one scale keep it."""
    if target.is_whole(layers):
        return replace(layers[target.sources[0]], target=name)
    own = [layers[source] for source in target.sources]
    scale = own[0].scale if len({layer.scale for layer in own}) == 1 else 1.0
    scales = {layer.target: layer.scale / scale if scale else 1.0 for layer in own}
    parts: tuple[Any, ...] = tuple(factor for layer in own for factor in layer.factors)
    form = target.form(layers, target.rank(layers))

    def product(*loaded: Tensor) -> Product:
        pairs = zip(own, loaded[::2], loaded[1::2], strict=True)
        found = {layer.target: layer.unscaled(up, down) for layer, up, down in pairs}
        return target.product(found.__getitem__, scales, form.rank)

    stack = (form.experts,) if target.kind is Kind.PARAMETER else ()
    up: Any = Derived((*stack, form.rows, form.rank), parts, lambda *loaded: product(*loaded).up)
    down: Any = Derived((*stack, form.rank, form.columns), parts, lambda *loaded: product(*loaded).down)
    if stack:
        return Layer(name, target.kind, ExpertFactors(down, up, scale * form.rank), form.experts)
    return Layer(name, target.kind, LowRank(up, down, scale, turnable=True, kernel=own[0].kernel))
