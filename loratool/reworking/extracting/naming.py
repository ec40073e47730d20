"""What is extracted from a model, as a dialect names and divides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from loratool.adapters.formats import DIALECTS, WRITTEN
from loratool.adapters.layers import Kind
from loratool.bases.binding.components import components_of
from loratool.bases.binding.named import Named
from loratool.bases.weights import Slice, Stacked, StoredWeight
from loratool.errors import FitError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.words import TEXT_WORDS
from loratool.reworking.converting.naming import LAYOUTS, respelled
from loratool.reworking.converting.rows import Outline, Target
from loratool.reworking.dialects import Manner
from loratool.reworking.extracting.pairing import Change, Pairing

WAY_OUT = "extract with --to peft, then run `loratool convert` on the adapter"


def manner_of(asked: str | None, base: Checkpoint) -> Manner:
    """The dialect that is asked for, else that of a pipeline's tools, of llama.cpp, or PEFT's. Raises `UsageError` for one of other models."""
    plain = WRITTEN.dialects[0]
    dialect = asked or ("diffusers" if base.components else "gguf" if isinstance(base, Named) else plain)
    of_images = dialect in LAYOUTS and dialect != plain
    if (of_images and not components_of(base)) or (dialect != plain and dialect in WRITTEN.dialects):
        raise UsageError(f"extract cannot write {dialect} for such a model; {WAY_OUT}")
    return Manner(DIALECTS[dialect].format.for_model(base.config), dialect)


def named_as(manner: Manner, found: Pairing) -> Manner:
    """Give changes the names of the dialect, which may know the architecture then, and divide them as it does.

    Raises `FitError` for what the dialect cannot hold.
    """
    if manner.form is WRITTEN:
        return manner
    of_images = manner.dialect in LAYOUTS
    if of_images and (beside := [*found.whole, *found.biases]):
        raise FitError(
            f"{manner.dialect} cannot store these tensors, which are not matrices or belong to modules that are saved "
            "whole; leave them out with --include or --exclude, or pass --to peft:",
            map(printable, beside),
        )
    called = words_of(found.base, found.changes) if of_images else {target: target for target in found.changes}
    own = {called[target]: change for target, change in found.changes.items()}
    layers = {name: Outline(name, *change.layer, change.kind, change.experts) for name, change in own.items()}
    wanted = respelled(layers, manner.dialect, "", "", found.base)
    cut = {name: target for name, target in wanted.targets.items() if not target.is_whole(layers)}
    if odd := [name for name, target in cut.items() if any(own[source].turned for source in target.sources)]:
        raise FitError(
            f"{manner.dialect} divides these layers, which are stored (in, out); {WAY_OUT}:", map(printable, odd)
        )
    found.changes = {name: divided(name, target, own, layers) for name, target in wanted.targets.items()}
    return replace(manner, architecture=wanted.architecture, notes=wanted.notes)


def divided(name: str, target: Target, changes: Mapping[str, Change], layers: Mapping[str, Outline]) -> Change:
    """The change of a layer of the dialect: a whole one of the model, or rows of some, as both models have them."""
    if target.is_whole(layers):
        return replace(changes[target.sources[0]], target=name)

    def stacked(which: Callable[[Change], StoredWeight]) -> StoredWeight:
        pieces: list[StoredWeight | int] = []
        for rows in (rows for parts in target.experts for rows in parts):
            if not rows.target:
                pieces.append(rows.count)
                continue
            height, width = changes[rows.target].shape
            first = rows.first + (rows.expert or 0) * height
            pieces.append(Slice(which(changes[rows.target]).matrix(width), first, rows.count))
        return Stacked(tuple(pieces), len(target.experts) if target.kind is Kind.PARAMETER else 0)

    same = all(changes[source].same for source in target.sources)
    return Change(
        name, target.kind, stacked(lambda c: c.base), stacked(lambda c: c.tuned), len(target.experts), same=same
    )


def words_of(base: Checkpoint, targets: Mapping[str, Change]) -> dict[str, str]:
    """The weights of a base by what adapters call them: a word for the component, and the name there."""
    parts = sorted(components_of(base), key=lambda part: len(part.prefix), reverse=True)
    found: dict[str, str] = {}
    for target in targets:
        part = next(part for part in parts if target.startswith(part.prefix))
        text = next((word for word in part.words if word in TEXT_WORDS), part.name)
        word = part.name if base.components else "diffusion_model" if part.is_denoiser else text
        found[target] = f"{word}.{target.removeprefix(part.prefix)}"
    return found
