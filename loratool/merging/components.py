"""Components of image models in a merge: those that it is limited to, and the weights that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapters.adapter import Adapter
from loratool.errors import FitError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.notes import Note
from loratool.templates import listed

if TYPE_CHECKING:
    from loratool.adapters.blocks import BlockWeights
    from loratool.bases.binding.components import Component


@dataclass(frozen=True)
class Factors:
    """What the weights of adapters are multiplied by in each component and each block."""

    by_prefix: Mapping[str, float]  # of tensors' names
    blocks: BlockWeights | None = None

    def of(self, tensor: str) -> float:
        """The factor for a tensor: that of its component times that of its block."""
        prefix = max(filter(tensor.startswith, self.by_prefix), key=len, default=None)
        component = 1.0 if prefix is None else self.by_prefix[prefix]
        return component if self.blocks is None else component * self.blocks.factor(tensor)


def factors_of(base: Checkpoint, pairs: Sequence[str], words: Sequence[str], notes: list[Note]) -> Factors:
    """The factors that `COMPONENT=FACTOR` texts and the words of --block-weights name.

    Raises `UsageError` for a component that the base has not.
    """
    blocks = blocks_of(words) if words else None
    if not pairs:
        return Factors({}, blocks)
    from loratool.bases.binding.components import components_of  # which knows many models

    named = {word: float(number) for word, _, number in (text.rpartition("=") for text in pairs)}
    parts = components_of(base)
    found: dict[str, float] = {}
    for word, factor in named.items():
        part = component_named(word, parts, base, "--component-weight")
        if part.prefix in found:
            raise UsageError(f"--component-weight names {printable(part.shown)} twice")
        found[part.prefix] = factor
        notes.append(Note("component-weight", f"weights are multiplied by {factor:g} in {printable(part.shown)}"))
    return Factors({part.prefix: found.get(part.prefix, 1.0) for part in parts}, blocks)


def blocks_of(words: Sequence[str]) -> BlockWeights:
    """What the words of --block-weights say."""
    from loratool.adapters.blocks import BlockWeights  # with the names of blocks in all layouts

    return BlockWeights.of(words)


def component_named(word: str, parts: Sequence[Component], base: Checkpoint, flag: str) -> Component:
    """The component that a word means."""
    if not parts:
        raise UsageError(f"{flag} is for image and video models, and {base.name} is not known to be one")
    for part in parts:
        if word == part.name or word in part.words:
            return part
    there = ", ".join(printable(part.shown) for part in parts)
    raise UsageError(f"{flag}: {base.name} has no component {printable(repr(word))}, only {there}")


def limited(adapters: Sequence[Adapter], base: Checkpoint, only: Sequence[str]) -> list[Adapter]:
    """The adapters with what they change in some components, each with a note on the rest.

    Raises `FitError` where nothing is left.
    """
    if not only:
        return list(adapters)
    from loratool.bases.binding.components import components_of  # which knows many models

    parts = components_of(base)
    chosen = [component_named(word, parts, base, "--only") for word in only]
    found = [within(adapter, base, parts, chosen) for adapter in adapters]
    if adapters and not any(adapter.updates for adapter in found):
        raise FitError(
            f"--only {', '.join(map(printable, only))} leaves nothing of {', '.join(a.name for a in adapters)}"
        )
    return found


def within(adapter: Adapter, base: Checkpoint, parts: Sequence[Component], chosen: Sequence[Component]) -> Adapter:
    """The part of an adapter that belongs to the chosen components, or to none that is known."""
    from loratool.bases.binding.distributing import distribute, first_word

    spread = distribute(adapter.updates, parts, base.tensors)
    prefixes = {part.prefix for part in chosen}
    words = {word for part in chosen for word in (part.name, *part.words)}
    dropped = {target for prefix, share in spread.shares.items() if prefix not in prefixes for target in share.values()}
    dropped |= {target for target in spread.reasons if (word := first_word(target)) and word not in words}
    if not dropped:
        return adapter
    names = ", ".join(printable(part.shown) for part in chosen)
    note = Note("component-left-out", f"{len(dropped)} updates outside of {names} are left out: {listed(dropped)}")
    return replace(
        adapter,
        updates={target: update for target, update in adapter.updates.items() if target not in dropped},
        notes=(*adapter.notes, note),
    )
