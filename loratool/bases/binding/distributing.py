"""Which component of an image or video model each target belongs to, and what the target is called there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loratool.adapters.adapter import Flattened
from loratool.bases.binding.components import Component
from loratool.bases.binding.flattened import missing
from loratool.errors import printable
from loratool.layouts.diffusion.words import DENOISER, DIFFUSERS_WORDS, SECOND_DENOISERS, TEXT_WORDS

WORDS = (*DENOISER, *SECOND_DENOISERS, *sorted(TEXT_WORDS), "vae")


@dataclass
class Distribution:
    """The targets of an adapter by component, under their names there; those of none stay with the base as a whole."""

    shares: dict[str, dict[str, str]] = field(default_factory=dict)  # prefix → name there → target
    rest: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def distribute(targets: Iterable[str], parts: Sequence[Component], names: Mapping[str, object]) -> Distribution:
    """Find the component of every target; `names` are those of the base's tensors."""
    found = Distribution()
    for target in targets:
        choices = {(part.prefix, name) for part, name in meanings(target, parts, names)}
        match sorted(choices):
            case [(prefix, name)]:
                if (owner := found.shares.setdefault(prefix, {}).setdefault(name, target)) is not target:
                    found.reasons[target] = f"{printable(prefix + name)} is edited by {printable(owner)} already"
            case []:
                why = "" if target in names else why_nowhere(target, parts)
                if why:
                    found.reasons[target] = why
                else:
                    found.rest.append(target)
            case several:
                found.reasons[target] = f"it may be any of {', '.join(printable(p + n) for p, n in several)}"
    return found


def meanings(target: str, parts: Sequence[Component], names: Mapping[str, object]) -> Iterator[tuple[Component, str]]:
    """The components, and names in them, that a target may mean: the most literal reading that there is."""
    if not isinstance(target, Flattened) and target in names:
        yield from [(part, target[len(part.prefix) :]) for part in parts if target.startswith(part.prefix)][:1]
        return
    unknown: list[tuple[Component, str]] = []
    for part, rest, word in readings(target, parts):
        found = names_in(part, rest, word)
        yield from ((part, name) for name in found)
        if found:
            return
        if word:
            unknown.append((part, rest))
    whole = [(part, name) for part in parts for name in names_in(part, target, "")]
    yield from whole
    if not whole and not isinstance(target, Flattened):
        denoisers = [(part, target) for part in parts if part.is_denoiser][:1]
        yield from unknown[:1] or ([] if first_word(target) else denoisers)


def readings(target: str, parts: Sequence[Component]) -> Iterator[tuple[Component, str, str]]:
    """The ways to take the beginning of a target for a component's prefix or for a word that adapters have for it."""
    flat = isinstance(target, Flattened)
    for part in parts:
        for word in sorted((part.prefix, *(f"{word}." for word in part.words)), key=len, reverse=True):
            start = word.replace(".", "_") if flat else word
            if start and target.startswith(start):
                rest = target[len(start) :]
                yield part, Flattened(rest) if flat else rest, word.rstrip(".")


def names_in(part: Component, name: str, word: str) -> tuple[str, ...]:
    """The names and aliases of a component that a name means there."""
    if isinstance(name, Flattened):
        return part.flattened.get(name, ())
    if word in DIFFUSERS_WORDS and name in part.model.tensors and (pieces := part.aliases.diffusers.get(name)):
        return tuple(piece.tensor for piece in pieces)  # Wan has a norm2 and a norm3 in both layouts
    return (name,) if name in part.model.tensors or name in part.aliases.names else ()


def first_word(target: str) -> str:
    """The word for a component that a target begins with; empty where it begins with none."""
    joint = "_" if isinstance(target, Flattened) else "."
    return max((word for word in WORDS if target.startswith(word + joint)), key=len, default="")


def why_nowhere(target: str, parts: Sequence[Component]) -> str:
    """Why no component has a target that begins as those of components do; empty where that is left to other rules."""
    word = first_word(target)
    if word and not any(word in part.words for part in parts):
        there = [part.shown for part in parts]
        return (
            f"the base has no component {printable(word)}, only {printable(', '.join(there))}; pass --only "
            f"{printable(' or --only '.join(there[:2]))} to leave it out"
        )
    if not isinstance(target, Flattened):
        return ""
    near = next((part for part in parts if word in part.words), None) or next(iter(parts))
    rest = target[len(word) + 1 :] if word else target
    return missing(Flattened(rest), {flat: list(names) for flat, names in near.flattened.items()})
