"""The layers of an adapter of an image model, as a dialect names them and divides them.

What a module is called, and whether q, k and v are one, depends on the dialect and on the architecture: kohya's tools have
the names of diffusers for Stable Diffusion 1 and the authors' names for all else. `layouts.diffusion.known` lists every
module of known architectures in both layouts, so that names without dots are looked up, and none is taken apart by guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

from loratool.adapters.adapter import Flattened
from loratool.adapters.formats import DIALECTS
from loratool.adapters.formats.named.dialects import spelling_of
from loratool.adapters.layers import Contents, Kind
from loratool.adapters.model_settings import model_types
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.known import ARCHITECTURES, links
from loratool.layouts.diffusion.rows import Row
from loratool.layouts.diffusion.words import DENOISER, SECOND_DENOISERS, TEXT_WORDS
from loratool.notes import Note
from loratool.results.text import plural
from loratool.reworking.converting.fusing import fused, split, stacked
from loratool.reworking.converting.rows import Rows, Sized, Target
from loratool.templates import grouped

ORIGINAL, DIFFUSERS = "original", "diffusers"  # layouts of names
DENOISING = "denoiser"  # the component that is no text encoder
# Which layout each dialect has the denoiser in; by architecture where that makes a difference.
LAYOUTS: Mapping[str, Callable[[str], str]] = {
    "kohya": lambda architecture: DIFFUSERS if architecture in ("sd15", "sd2") else ORIGINAL,
    "lycoris": lambda architecture: DIFFUSERS if architecture in ("sd15", "sd2") else ORIGINAL,
    "comfy": lambda architecture: ORIGINAL,  # noqa: ARG005
    "diffusers": lambda architecture: DIFFUSERS,  # noqa: ARG005
    "peft": lambda architecture: DIFFUSERS,  # noqa: ARG005
}
FLAT = ("kohya", "lycoris")
# What kohya's tools call text encoders, of a model with several.
KOHYA_TEXTS = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
TEXT_MODEL = "text_model."  # what the names of CLIP begin with
LAST = frozenset({"z-image"})  # architectures whose names in diffusers are the last of those of their family
WORDS = tuple(sorted({*DENOISER, *SECOND_DENOISERS, *TEXT_WORDS}, key=len, reverse=True))
STARTS = tuple((word, f"{word}_") for word in WORDS)  # of names without dots


@dataclass(frozen=True)
class Known:
    """A module of a known architecture."""

    component: str  # DENOISING, or a text encoder by what it is
    row: Row
    part: int  # of the row's parts that its name is; −1 where it is the original


@cache
def names_of(architecture: str, component: str) -> Mapping[str, Mapping[str, Known]]:
    """The modules of a component of an architecture, by layout and by their names without dots."""
    rows = links(architecture if component == DENOISING else component)
    rows = rows[::-1] if architecture in LAST else rows
    original: dict[str, Known] = {}
    diffusers: dict[str, Known] = {}
    for row in rows:
        if row.original.endswith("_bias"):
            continue
        original.setdefault(flat(row.original.removesuffix(".scale")), Known(component, row, -1))
        for number, part in enumerate(row.parts):
            known, module = Known(component, row, number), part.removesuffix(".weight")
            diffusers.setdefault(flat(module), known)
            if module.startswith(TEXT_MODEL):  # which transformers 5 leaves out
                diffusers.setdefault(flat(module.removeprefix(TEXT_MODEL)), known)
    return {ORIGINAL: original, DIFFUSERS: diffusers}


def flat(module: str) -> str:
    return module.replace(".", "_")


@cache
def components_of(architecture: str) -> Mapping[str, str]:
    """The components of an architecture by the words that mean them; an empty word means the denoiser."""
    texts = ARCHITECTURES[architecture].texts
    return {
        **{
            word: text for text in texts if text == "t5xxl" for word in ("te2", "t5")
        },  # as OneTrainer counts those of Flux
        **{own: text for text, own in KOHYA_TEXTS.items() if text in texts},
        **{f"text_encoder_{number}": text for number, text in enumerate(texts, 1)},
        **{word: text for text in texts[:1] for word in ("te", "text_encoder")},
        **{text: text for text in texts},
        **dict.fromkeys(("", *DENOISER), DENOISING),
    }


def candidates(target: str) -> Sequence[tuple[str, str]]:
    """(word for a component, module without dots) as which a target may be meant; an empty word where it names none."""
    return meanings(target.rpartition(".")[0], isinstance(target, Flattened))


@lru_cache(1 << 14)  # each architecture asks for the same ones
def meanings(module: str, flattened: bool) -> tuple[tuple[str, str], ...]:
    """The same of a module, whose dots may be underscores."""
    plain = ("", flat(module))
    if not flattened:
        word, _, path = module.partition(".")
        return ((word, flat(path)), plain) if word in WORDS else (plain,)
    return (*((word, plain[1].removeprefix(start)) for word, start in STARTS if plain[1].startswith(start)), plain)


def names_component(target: str) -> bool:
    """Whether a target may be more than the name of a weight of one model."""
    return isinstance(target, Flattened) or target.partition(".")[0] in WORDS


def image_architecture(targets: Collection[str]) -> str:
    """The first known architecture of image models that has all of some targets; empty where none has.

    Targets may be those of PEFT's adapters, which name no component. Names of language models are not looked up.
    """
    may_be = any(names_component(t) or spelling_of(f"base_model.model.{t.rpartition('.')[0]}") for t in targets)
    return next((reading.architecture for reading in readings(targets)), "") if may_be else ""


def refuse_image_modules(targets: Collection[str], dialect: str) -> None:
    """Raise `InputError` for modules of an image model where a dialect is one of language models."""
    if dialect not in LAYOUTS and (architecture := image_architecture(targets)):
        raise InputError(
            f"{dialect} is for language models, and these are modules of {architecture}; --to peft writes adapters of "
            "image models for PEFT"
        )


def found_in(target: str, architecture: str, layout: str) -> Known | None:
    """The module of an architecture that a target is, with the denoiser's names in a layout."""
    for word, module in candidates(target):
        if component := components_of(architecture).get(word):
            modules = names_of(architecture, component)[layout if component == DENOISING else DIFFUSERS]
            if module in modules:
                return modules[module]
    return None


@dataclass(frozen=True)
class Reading:
    """What all targets of an adapter are, in the first architecture and layout that has all of them."""

    architecture: str
    layout: str
    modules: Mapping[str, Known]


def readings(targets: Iterable[str], only: str = "") -> list[Reading]:
    """The architectures that have all of some targets."""
    every = list(targets)
    found: list[Reading] = []
    for architecture in (only,) if only else ARCHITECTURES:
        for layout in (DIFFUSERS, ORIGINAL):
            modules = {target: found_in(target, architecture, layout) for target in every[:1]}
            if None not in modules.values():
                modules = {target: found_in(target, architecture, layout) for target in every}
            complete = {target: known for target, known in modules.items() if known is not None}
            if len(complete) == len(every):
                found.append(Reading(architecture, layout, complete))
    return found


def chosen(found: Sequence[Reading], layers: Mapping[str, Sized], hint: str) -> tuple[Reading, tuple[Note, ...]]:
    """The reading that is meant: by the file's header, by the width of text that attention takes in, else the first."""
    said = [reading for reading in found if reading.architecture == hint]
    wide = [reading for reading in found if reading.architecture in by_width(layers)]
    several = {reading.architecture for reading in found}
    if said or wide or len(several) == 1:
        return (said or wide or list(found))[0], ()
    first = found[0]
    text = (
        f"its modules are those of {', '.join(sorted(several))}; {first.architecture} is assumed (--architecture sets "
        "another)"
    )
    return first, (Note(ASSUMED, text),)


ASSUMED = "architecture-assumed"  # the code of a note
WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}  # of the text that cross-attention of a U-Net takes in


def by_width(layers: Mapping[str, Sized]) -> set[str]:
    """Architectures of U-Nets, by the columns of the keys of cross-attention."""
    return {
        WIDTHS[layer.columns]
        for target, layer in layers.items()
        if flat(target.rpartition(".")[0]).endswith(("attn2_to_k", "attn2_to_v")) and layer.columns in WIDTHS
    }


@dataclass(frozen=True)
class Wanted:
    """The layers that a dialect has for those of an adapter."""

    targets: Mapping[str, Target]
    beside: Mapping[str, Target] = field(default_factory=dict)  # weights and biases that are stored in full
    architecture: str = ""  # where it is known
    notes: tuple[Note, ...] = ()  # what was assumed

    @property
    def is_assumed(self) -> bool:
        """Whether the architecture is one of several with such names."""
        return any(note.code == ASSUMED for note in self.notes)


def respelled(
    layers: Mapping[str, Sized],
    dialect: str,
    architecture: str,
    hint: str,
    base: Checkpoint | None = None,
    beside: Mapping[str, Sized] = MappingProxyType({}),
) -> Wanted:
    """The layers of an adapter as a dialect divides and names them, and weights and biases `beside` that are stored in full.

    `base` tells what neither names nor tables do. Dialects of language models have what is stored in full as it is.

    Raises `InputError` or `FitError` where names cannot be brought to the dialect.
    """
    config = base.config if base is not None else {}
    refuse_image_modules(layers, dialect)
    whole = {target: Target.same(each) for target, each in beside.items()}
    if dialect == "peft-split":
        apart, told = split(layers, config)
        return Wanted(apart, whole, notes=told)
    if dialect == "peft-fused":
        return Wanted(fused(layers), whole)
    names = dotted(base)
    if dialect not in LAYOUTS:
        named = {looked_up(t, names) if isinstance(t, Flattened) else t: layer for t, layer in layers.items()}
        every, told = stacked(named, DIALECTS[dialect].format, config)
        return Wanted(every, whole, notes=told)
    both: dict[str, Sized] = {**layers, **beside}
    own = dialect == "peft" and not any(map(names_component, both))  # PEFT has the names of the model that was trained
    found = readings(both, architecture or hint) if not own else []
    if not found and (architecture or hint) and not own:
        found = readings(both)
        if found and architecture:
            fitting = dict.fromkeys(reading.architecture for reading in found)
            raise InputError(
                f"these are not modules of {architecture}, but of {' or '.join(fitting)}",
                hint=f"--architecture {found[0].architecture}",
            )
    if not found:
        return apart_from_layers(unknown(both, dialect, names), layers)
    reading, notes = chosen(found, layers, architecture or hint)
    wanted = apart_from_layers(Divided(reading, dialect, both, frozenset(layers)).targets(), layers)
    return replace(wanted, architecture=reading.architecture, notes=notes)


def apart_from_layers(targets: Mapping[str, Target], layers: Mapping[str, Sized]) -> Wanted:
    """Layers, and what is stored in full."""
    own = {name: target for name, target in targets.items() if target.sources[0] in layers}
    return Wanted(own, {name: target for name, target in targets.items() if name not in own})


def with_experts_apart(wanted: Wanted, layers: Mapping[str, Sized], config: Mapping[str, Any], server: str) -> Wanted:
    """The layers with factors for each expert by itself, where an adapter has one parameter for all of them."""
    fused = {
        name: layers[t.sources[0]]
        for name, t in wanted.targets.items()
        if t.kind is Kind.PARAMETER and t.is_whole(layers)
    }
    apart, told = split(fused, config, experts_only=True)
    cut = {name for name in fused if name not in apart}
    if not cut:
        return wanted
    others = {name: target for name, target in wanted.targets.items() if name not in fused}
    text = f"{plural(len(cut), 'parameter')} of experts split into a layer for each: {server} misreads them in one"
    if not model_types(config):
        text += ", except in a few models; pass --base to be sure"
    return replace(wanted, targets={**others, **apart}, notes=(*wanted.notes, *told, Note("experts-cut", text)))


# How headers of kohya's tools begin to call architectures.
HINTS = {
    "sd_v1": "sd15",
    "sd_1.5": "sd15",
    "sd_v2": "sd2",
    "sd_2": "sd2",
    "sdxl": "sdxl",
    "flux1": "flux",
    "lumina2": "lumina2",
}


def hint_of(contents: Contents) -> str:
    """The architecture that the header of an adapter names; empty for none."""
    said = contents.adapter.file.metadata.get("ss_base_model_version", "")
    return next((name for start, name in HINTS.items() if said.startswith(start)), "")


def dotted(base: Checkpoint | None) -> dict[str, str]:
    """The names of a base's weights by what they are without dots, also without a prefix that all of them have."""
    starts, names = ("model.diffusion_model.", ""), base.tensors if base is not None else ()
    return {Flattened.of(name.removeprefix(start)): name for start in starts for name in names}


def unknown(layers: Mapping[str, Sized], dialect: str, names: Mapping[str, str]) -> dict[str, Target]:
    """The layers of no known architecture: as they are, under the dialect's word for their component.

    Names without dots are looked up among `names` of a base.
    """
    targets: dict[str, Target] = {}
    odd: list[str] = []
    for given, layer in layers.items():
        target = looked_up(given, names) if isinstance(given, Flattened) and dialect not in FLAT else given
        name = target if dialect == "peft" else same_layout(target, dialect)
        if name is None:
            odd.append(printable(target))
        else:
            targets[name] = Target.same(layer)
    if odd:
        nearest, strange = nearest_architecture(layers)
        if 2 * len(strange) < len(layers):
            raise InputError(
                f"{dialect} names modules in the layout of their architecture. The others are modules of {nearest}, but "
                "these are not; remove their tensors from the file if they do not belong there, or choose another dialect:",
                map(printable, strange),
            )
        raise InputError(
            f"{dialect} names modules in the layout of their architecture, and these belong to none that is known "
            f"({', '.join(ARCHITECTURES)}); choose another dialect:",
            grouped(odd),
        )
    return targets


def nearest_architecture(targets: Collection[str]) -> tuple[str, list[str]]:
    """The architecture that has the most of some targets, and those that it has not."""
    lacking = (
        (name, [target for target in targets if not found_in(target, name, layout)])
        for name in ARCHITECTURES
        for layout in (DIFFUSERS, ORIGINAL)
    )
    return min(lacking, key=lambda found: len(found[1]))


def looked_up(target: str, names: Mapping[str, str]) -> str:
    """The name of a base that a target without dots means; the target itself where there is none."""
    leaf = target.rpartition(".")[2]
    return next((names[f"{path}.{leaf}"] for _, path in candidates(target) if f"{path}.{leaf}" in names), target)


def same_layout(target: str, dialect: str) -> str | None:
    """The name of a module of an unknown architecture in a dialect of the same layout; None in any other."""
    word, _, path = target.partition(".")
    if dialect == "diffusers" and spelling_of(target.rpartition(".")[0]) is None:
        return None  # `transformer.h.0…` is GPT-2's
    if isinstance(target, Flattened):
        return target if dialect in FLAT else None
    if word in TEXT_WORDS and (dialect == "diffusers") == word.startswith("text_encoder"):
        return target if dialect not in FLAT else Flattened.of(target)
    if word == "diffusion_model" and dialect != "diffusers":
        return target if dialect == "comfy" else Flattened.of(f"unet.{path}")
    return target if word in ("unet", "transformer", "prior", *SECOND_DENOISERS) and dialect == "diffusers" else None


@dataclass(frozen=True)
class Divided:
    """The layers of a known architecture, divided as a dialect has them."""

    reading: Reading
    dialect: str
    layers: Mapping[str, Sized]  # and what is stored in full
    factored: frozenset[str]  # those of them that are products

    def targets(self) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        fused: dict[tuple[Row, str, bool], dict[int, str]] = {}
        layout = LAYOUTS[self.dialect](self.reading.architecture)
        for target, known in self.reading.modules.items():
            layer, leaf = self.layers[target], leaf_of(target)
            if known.component != DENOISING or (known.part >= 0 and layout == DIFFUSERS):
                found = {self.name(known.component, known.row.parts[known.part], leaf): Target.same(layer)}
            elif known.part < 0 and layout == ORIGINAL:
                found = {self.name(known.component, known.row.original, leaf): Target.same(layer)}
            elif len(known.row.parts) > 1 and known.part >= 0:
                fused.setdefault((known.row, leaf, target in self.factored), {})[known.part] = target
                continue
            else:
                found = self.divided(known, layer)
            self.add(targets, found)
        for (row, leaf, _), parts in fused.items():
            self.add(targets, {self.name(DENOISING, row.original, leaf): self.joined(row, parts)})
        self.check_one_component()
        return targets

    def add(self, targets: dict[str, Target], found: Mapping[str, Target]) -> None:
        """Raise `FitError` where one weight of the dialect would be changed by factors and in full."""
        if twice := sorted(targets.keys() & found.keys()):
            raise FitError(
                f"{self.dialect} has one weight for several of this adapter, of which some are changed by factors and "
                "others in full; choose another dialect:",
                map(printable, twice),
            )
        targets.update(found)

    def name(self, component: str, module: str, leaf: str) -> str:
        """The weight or bias of a module as the dialect's reader has it."""
        module = f"{module.removesuffix('.weight').removesuffix('.scale')}.{leaf}"
        architecture = ARCHITECTURES[self.reading.architecture]
        texts = architecture.texts
        match self.dialect:
            case "kohya" | "lycoris":
                text = "te" if len(texts) == 1 else KOHYA_TEXTS.get(component, component)
                return Flattened.of(f"{'unet' if component == DENOISING else text}.{module}")
            case "comfy":
                return f"{'diffusion_model' if component == DENOISING else component}.{module}"
            case "peft":
                return module
        if component == DENOISING:
            return f"{'unet' if architecture.family.name == 'unet' else 'transformer'}.{module}"
        number = texts.index(component) + 1
        return f"text_encoder{f'_{number}' if number > 1 else ''}.{module}"

    def check_one_component(self) -> None:
        """Raise `FitError` where an adapter of PEFT's, which is of one model, would have several components."""
        components = sorted({known.component for known in self.reading.modules.values()})
        if self.dialect == "peft" and len(components) > 1:
            raise FitError(
                f"PEFT's adapters are for one model each, and this one changes {', '.join(components)}; "
                "--to diffusers writes all of them into one file"
            )

    def divided(self, known: Known, layer: Sized) -> dict[str, Target]:
        """The layers that a layer of the other layout is in this one: several, or one with its halves in other places."""
        row, leaf = known.row, leaf_of(layer.target)
        if not layer.columns and (row.swapped or "h" in row.sizes):
            raise InputError(
                f"{printable(layer.target)}: which of its rows go where is not known without its weight, which the "
                f"adapter does not change; {self.dialect} has them in another order or in several biases"
            )
        other = self.name(known.component, row.parts[0] if known.part < 0 else row.original, leaf)
        if row.swapped and layer.rows == 2 * layer.columns:
            half = layer.rows // 2
            return {other: Target(layer.kind, ((Rows(layer.target, half, half), Rows(layer.target, 0, half)),))}
        if len(row.parts) == 1:
            return {other: Target.same(layer)}
        found: dict[str, Target] = {}
        at = 0
        for part, size in zip(row.parts, sizes_of(row, layer.rows, layer.columns, layer.target), strict=True):
            found[self.name(known.component, part, leaf)] = Target(layer.kind, ((Rows(layer.target, at, size),),))
            at += size
        return found

    def joined(self, row: Row, parts: Mapping[int, str]) -> Target:
        """One layer of several, with zeros for those that the adapter does not have."""
        first = self.layers[next(iter(parts.values()))]
        letters = row.sizes or "a" * len(row.parts)
        known = {letters[number]: self.layers[target].rows for number, target in parts.items()}
        if first.columns:
            known.setdefault("h", first.columns)
        if unsure := [row.parts[n] for n in range(len(row.parts)) if letters[n] not in known]:
            raise InputError(
                f"{printable(row.original)}: how many rows {printable(unsure[0])} has is not known, which the adapter does "
                f"not change; {self.dialect} has it in one layer with {printable(row.parts[next(iter(parts))])}"
            )
        rows = tuple(Rows(parts.get(number, ""), 0, known[letters[number]]) for number in range(len(row.parts)))
        return Target(Kind.LINEAR, (rows,))


def leaf_of(target: str) -> str:
    """`weight` or `bias`; parameters that are named otherwise are weights to their tools."""
    return "bias" if target.endswith(".bias") else "weight"


def sizes_of(row: Row, rows: int, columns: int, target: str) -> list[int]:
    """How many rows each part of a fused layer has."""
    letters = row.sizes or "a" * len(row.parts)
    rest, uneven = divmod(rows - letters.count("h") * columns, len(letters) - letters.count("h"))
    if uneven or rest <= 0:
        raise InputError(f"{printable(target)}: its {rows} rows cannot be those of {', '.join(row.parts)}")
    return [columns if letter == "h" else rest for letter in letters]
