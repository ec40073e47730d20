"""Adapters in several dialects, or of a base whose weights have two names each, as adapters with the same names.

What a weight is called is looked up in the tables of known architectures; where dialects divide layers in other ways,
layers are cut and joined as `converting.rows` has it, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapters.adapter import derived
from loratool.adapters.formats import DIALECTS, format_of
from loratool.adapters.layers import Contents, Kind, Layer
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import Add, LowRank
from loratool.algebra.updates.experts import ExpertFactors
from loratool.algebra.updates.replacing import Replace
from loratool.errors import FitError, printable
from loratool.layouts.diffusion.known import ARCHITECTURES
from loratool.lazy import Tensor, torch
from loratool.notes import Note
from loratool.reworking.converting.naming import LAYOUTS, Reading, by_width, hint_of, readings, respelled, same_layout
from loratool.reworking.converting.rows import Target, narrowed
from loratool.reworking.converting.wholes import outlines, stored_in_full, update_of

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


OF_IMAGES = LAYOUTS.keys() - {"peft"}


def dialect_of(source: Contents) -> str:
    """The dialect of an adapter, or one that the same tools read; empty where it is not written."""
    own = next(iter(source.adapter.dialects or format_of(source.adapter).dialects), "")
    found = NEAREST.get(own, own)
    return found if found in DIALECTS else ""


def named_alike(sources: Sequence[Contents], dialect: str = "") -> list[Contents]:
    """The same adapters, all of several in the names of one dialect; where none is given, in that of the first, or of
    the first that is not PEFT's, which has no names for text encoders.

    Raises `FitError` where these are not known: no architecture has the weights of all.
    """
    dialects = [dialect_of(source) for source in sources]
    wanted = dialect or next((own for own in dialects if own in OF_IMAGES), dialects[0])
    if len(sources) == 1 or wanted not in OF_IMAGES or not all(map(is_of_images, sources, dialects)):
        return list(sources)  # targets of others are the names of one model in memory
    known = [readings(source.layers) for source in sources]
    styles = {
        (one_style(source, own), found[0].layout if found else "")
        for source, own, found in zip(sources, dialects, known, strict=True)
    }
    alike = next(iter(styles))[0] if len(styles) == 1 else ""
    if alike == wanted:
        return list(sources)
    architecture, notes = common(sources, known)
    if not architecture and alike:
        return list(sources)
    if not architecture:
        raise FitError(
            "these names of weights are of several dialects, and no architecture that is known "
            f"({', '.join(ARCHITECTURES)}) has all of them:",
            (f"{source.name}: {printable(next(iter(source.layers), 'no low-rank update'))}" for source in sources),
        )
    found = [in_dialect(source, wanted, architecture) for source in sources]
    first = found[0].adapter
    return [replace(found[0], adapter=replace(first, notes=(*first.notes, *notes))), *found[1:]]


def is_of_images(source: Contents, dialect: str) -> bool:
    """Whether an adapter's dialect, or else its names, are those of image and video models."""
    return dialect in OF_IMAGES or (dialect in LAYOUTS and bool(readings(source.layers)))


def in_dialect(source: Contents, dialect: str, architecture: str) -> Contents:
    """An adapter with the layers that a dialect has, those that are parts of others at the rank that they need."""

    def load(target: str) -> Product:
        return source.layers[target].load_factors(torch.device("cpu"), torch.float32)

    wanted = respelled(source.layers, dialect, architecture, architecture, beside=outlines(source))
    found = renamed(source, narrowed(wanted.targets, source.layers, load), wanted.beside)
    return replace(found, adapter=replace(found.adapter, dialects=(dialect,)))


def one_style(source: Contents, dialect: str) -> str:
    """The dialect in which all of an adapter's targets are named; empty where they are not."""
    return dialect if all(same_layout(target, dialect) == target for target in source.layers) else ""


def common(sources: Sequence[Contents], known: Sequence[Sequence[Reading]]) -> tuple[str, tuple[Note, ...]]:
    """The architecture that all adapters are of; of several the one that headers, widths or else the table put first."""
    each = [{reading.architecture for reading in found} for found in known]
    names = [name for name in ARCHITECTURES if all(name in found for found in each)]
    said = {hint_of(source) for source in sources}
    wide = set[str]().union(*(by_width(source.layers) for source in sources))
    sure = [name for name in names if name in said] or [name for name in names if name in wide]
    if sure or len(names) < 2:
        return (sure or names or [""])[0], ()
    text = f"their modules are those of {', '.join(names)}; {names[0]} is assumed"
    return names[0], (Note("architecture-assumed", text),)


def renamed(source: Contents, targets: Mapping[str, Target], beside: Mapping[str, Target]) -> Contents:
    """An adapter with the layers that a dialect has, and what it stores in full (`beside`).

    Factors of layers that are joined or cut are made when they are loaded.
    """
    layers = {name: as_layer(name, target, source.layers) for name, target in targets.items()}
    moved = {target.sources[0]: name for name, target in targets.items() if target.is_whole(source.layers)}
    if torn := [t for t, layer in source.layers.items() if t not in moved and layer.magnitude]:
        raise FitError("DoRA of layers that this dialect splits differently cannot be written:", map(printable, torn))
    biases = {}
    for target, bias in source.biases.items():
        weight = f"{target.removesuffix('bias')}weight"
        name = moved.get(weight, weight)
        biases[f"{name.removesuffix('weight')}bias"] = bias
    every = stored_in_full(source)
    full = {name: update_of(name, target, every) for name, target in beside.items()}
    changes = {name: update for name, update in full.items() if isinstance(update, Add)}
    saved = {name: update for name, update in full.items() if isinstance(update, Replace)}
    return replace(source, layers=layers, biases=biases, changes=changes, saved=saved)


def as_layer(name: str, target: Target, layers: Mapping[str, Layer]) -> Layer:
    """A layer of a dialect, its factors still on disk; those of one scale keep it."""
    if target.is_whole(layers):
        return replace(layers[target.sources[0]], target=name)
    own = [layers[source] for source in target.sources]
    scale = own[0].scale if len({layer.scale for layer in own}) == 1 else 1.0
    scales = {layer.target: layer.scale / scale if scale else 1.0 for layer in own}
    parts = [factor for layer in own for factor in layer.factors]
    form = target.form(layers, target.rank(layers))

    def product(*loaded: Tensor) -> Product:
        pairs = zip(own, loaded[::2], loaded[1::2], strict=True)
        found = {layer.target: layer.unscaled(up, down) for layer, up, down in pairs}
        return target.product(found.__getitem__, scales, form.rank)

    stack = (form.experts,) if target.kind is Kind.PARAMETER else ()
    up = derived((*stack, form.rows, form.rank), lambda *loaded: product(*loaded).up, *parts)
    down = derived((*stack, form.rank, form.columns), lambda *loaded: product(*loaded).down, *parts)
    if stack:
        return Layer(name, target.kind, ExpertFactors(down, up, scale * form.rank), form.experts)
    return Layer(name, target.kind, LowRank(up, down, scale, turnable=True, kernel=own[0].kernel))
