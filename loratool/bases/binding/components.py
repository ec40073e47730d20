"""The components of an image or video model: which tensors of a base are its denoiser, its text encoders, its VAE.

A pipeline has each in a folder, a single file has them under prefixes, and a file or folder may be one of them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from loratool.adapters.adapter import Flattened
from loratool.algebra.updates.base import Update
from loratool.bases.binding.aliases import Aliases, Pieces, aliases_of, family_of, match_of
from loratool.bases.binding.places import Match, Rule
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import TensorInfo
from loratool.layouts.diffusion.components import DENOISERS, TEXT_ENCODERS
from loratool.layouts.diffusion.rows import Family
from loratool.layouts.diffusion.unet import UNET
from loratool.layouts.diffusion.vae import VAE
from loratool.layouts.diffusion.words import CLIP_G, CLIP_L, DENOISER, SECOND_DENOISERS, STORED, T5_WORDS, TEXT_WORDS


@dataclass(frozen=True)
class Portion(Checkpoint):
    """A component as a model of its own: its tensors by their names there."""

    held: Mapping[str, TensorInfo] = None  # type: ignore[assignment]  # always given
    settings: Mapping[str, object] = None  # type: ignore[assignment]  # its config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.held

    @cached_property
    def config(self) -> Mapping[str, object]:
        return self.settings


@dataclass(frozen=True)
class Component:
    """One part of a base."""

    name: str  # what diffusers calls it, or its file
    prefix: str  # of its tensors' names in the base
    words: tuple[str, ...]  # what adapters call it
    model: Portion
    family: Family | None

    @property
    def is_denoiser(self) -> bool:
        return self.family in DENOISERS or self.name in ("denoiser", *DENOISER)  # of a family that no table has, too

    @property
    def shown(self) -> str:
        """What people call it, which is also a word for it: as diffusers does."""
        if self.name == "denoiser":
            return "unet" if self.family is UNET else "transformer"
        return next((word for word in self.words if word.startswith("text_encoder")), self.name)

    @property
    def layout(self) -> str:
        """The layouts that the aliases are from, for a note."""
        return f"layouts of {self.family.name}" if self.family else "prefixes of text encoders"

    @cached_property
    def aliases(self) -> Aliases:
        is_text = not self.is_denoiser and self.name != "vae"
        return aliases_of(self.model.tensors, self.family, is_text)

    def match(self, target: str, update: Update) -> Match | None:
        """The places of an update whose target is another name of a weight; None where it is no such name.

        Raises `Misfit` where its shape is another.
        """
        pieces = self.aliases.names.get(target)
        if pieces is None or target in self.model.tensors:
            return None
        return match_of(pieces, update, self.model.tensors, Rule(("other-layout", self.layout)))

    @cached_property
    def flattened(self) -> Mapping[str, tuple[str, ...]]:
        """Each name and alias without dots → those that it may mean: only one of several that mean the same."""
        found: dict[str, dict[object, str]] = {}
        for name in self.model.tensors:
            found.setdefault(Flattened.of(name), {}).setdefault(name, name)
        for alias, pieces in self.aliases.names.items():
            if alias not in self.model.tensors:
                found.setdefault(Flattened.of(alias), {}).setdefault(own_name(pieces), alias)
        return {flat: tuple(names.values()) for flat, names in found.items()}


def own_name(pieces: Pieces) -> object:
    """The name of the tensor that an alias means all of as it is; else what it means."""
    first, *more = pieces
    return pieces if more or not first.whole or first.transposed else first.tensor


def components_of(base: Checkpoint) -> tuple[Component, ...]:
    """The components of an image or video model; none of any other."""
    if base.components:
        found = [(name, f"{name}.", model.config) for name, model in base.components.items()]
    else:
        found = [(kind, prefix, {}) for prefix, kind in prefixes_of(base.tensors)]
        if not any(kind == "denoiser" for kind, _, _ in found) and family_of(base.tensors, DENOISERS):
            found = [("denoiser", "", base.config), *found]
        for name, families in (("vae", (VAE,)), ("text_encoder", TEXT_ENCODERS)):
            if not found and family_of(base.tensors, families):
                found = [(name, "", base.config)]
    known = {prefix for _, prefix, _ in found if prefix}
    parts: list[Component] = []
    for name, prefix, config in found:
        held = {
            local: replace(info, name=local)
            for full, info in base.tensors.items()
            if full.startswith(prefix) and (prefix or not any(map(full.startswith, known)))
            for local in [full[len(prefix) :]]
        }
        families = DENOISERS if name in ("denoiser", *DENOISER, *SECOND_DENOISERS) else TEXT_ENCODERS
        family = family_of(held, (VAE,) if name == "vae" else families)
        settings = config or {"_class_name": family.name if family else ""}
        model = base.seen_as(Portion, held=held, settings=settings, components={})
        parts.append(Component(name, prefix, (), model, family))
    return with_words(parts)


def prefixes_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """The known prefixes that some names begin with, each with what stands there."""
    heads = {".".join(name.split(".", 4)[:count]) + "." for name in names for count in (1, 2, 3, 4)}
    found: dict[str, str] = {}
    for prefix, kind in STORED:
        start, wild, end = prefix.partition("*")
        for head in sorted(heads):
            if head == prefix:
                found.setdefault(head, kind)
            elif wild and fits(head, start, end) and not any(map(head.startswith, found)):
                found[head] = head[len(start) : len(head) - len(end)]
    return list(found.items())


def fits(head: str, start: str, end: str) -> bool:
    """Whether it is a name of one component between a beginning and an end."""
    return head.startswith(start) and head.endswith(end) and head.count(".") == (start + end).count(".")


def with_words(parts: list[Component]) -> tuple[Component, ...]:
    """The components with what adapters may call each: by what it is, then by its position, if nothing else has the word."""
    texts = [p for p in parts if not p.is_denoiser and p.name != "vae" and p.name not in SECOND_DENOISERS]
    if len(parts) == 1 and texts and not parts[0].prefix:  # a text encoder alone, whichever it is in its pipeline
        return (replace(parts[0], words=tuple(sorted(TEXT_WORDS))),)
    clips = [part for part in texts if part.family is not None and part.family.name == "clip"]
    ordered = sorted(texts, key=lambda part: order_of(part, clips))
    claims = [
        *((part.name, part) for part in parts),
        *((word, part) for part in [part for part in parts if part.is_denoiser][:1] for word in DENOISER),
        *((word, part) for part in texts for word in kinds_of(part, clips)),
        *((f"te{number}", part) for number, part in enumerate(ordered, 1)),
        *((f"text_encoder_{number}" if number > 1 else "text_encoder", part) for number, part in enumerate(ordered, 1)),
        *((word, part) for part in texts if len(texts) == 1 for word in ("te", "te1", "prior_te")),
    ]
    taken: dict[str, Component] = {}
    for word, part in claims:
        taken.setdefault(word, part)
    return tuple(replace(part, words=tuple(word for word, owner in taken.items() if owner is part)) for part in parts)


def kinds_of(part: Component, clips: list[Component]) -> tuple[str, ...]:
    """Words for a text encoder by what it is: the first CLIP is CLIP-L, a second one CLIP-G."""
    if part in clips:
        if part.name in ("clip_g", "clip_h"):
            return CLIP_G if part.name == "clip_g" else ()
        return CLIP_L if part is clips[0] or part.name == "clip_l" else CLIP_G
    return T5_WORDS if part.family is not None and part.family.name == "t5" else ()


def order_of(part: Component, clips: list[Component]) -> tuple[int, str]:
    """The place of a text encoder among those of its model."""
    if part.name.startswith("text_encoder"):
        return (0, part.name)
    words = kinds_of(part, clips)
    return (1 if "clip_l" in words else 2 if "clip_g" in words else 3 if words else 4, "")
