"""What is extracted from an image model, under the names of a dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapters.adapter import Derived
from loratool.adapters.formats import DIALECTS, WRITTEN
from loratool.adapters.layers import Layer
from loratool.algebra.updates.additive import LowRank
from loratool.bases.binding.components import components_of
from loratool.errors import FitError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.components import TEXT_WORDS
from loratool.lazy import Tensor
from loratool.reworking.converting.naming import LAYOUTS, respelled
from loratool.reworking.dialects import Manner
from loratool.reworking.extracting.pairing import Change, Pairing

WAY_OUT = "extract with --to peft, then run `loratool convert` on the adapter"


def manner_of(asked: str | None, base: Checkpoint) -> Manner:
    """The dialect that is asked for, else that of a pipeline's tools or PEFT's. Raises `UsageError` for one of other models."""
    plain = WRITTEN.dialects[0]
    dialect = asked or ("diffusers" if base.components else plain)
    of_images = dialect in LAYOUTS and dialect != plain
    if (of_images and not components_of(base)) or (dialect != plain and dialect in WRITTEN.dialects):
        raise UsageError(f"extract does not write {dialect} of such a model; {WAY_OUT}")
    return Manner(DIALECTS[dialect].for_model(base.config), dialect)


def named_as(manner: Manner, found: Pairing) -> Manner:
    """Give changes of an image model the names of the dialect, which may know the architecture then.

    Raises `FitError` for what the dialect cannot hold, and for layers that it divides otherwise.
    """
    if manner.form is WRITTEN or manner.dialect not in LAYOUTS:
        return manner
    if beside := [*found.whole, *found.biases]:
        raise FitError(
            f"{manner.dialect} cannot store these tensors, which are no matrices or belong to modules that are saved "
            "whole; leave them out with --include or --exclude, or pass --to peft:",
            map(printable, beside),
        )
    called = words_of(found.base, found.changes)
    layers = {called[target]: layer_of(called[target], change) for target, change in found.changes.items()}
    wanted = respelled(layers, manner.dialect, "", "", found.base)
    own = {target.sources[0]: name for name, target in wanted.targets.items() if target.is_whole(layers)}
    if others := [target for target, name in called.items() if name not in own]:
        text = f"{manner.dialect} divides these layers otherwise; {WAY_OUT}:"
        raise FitError(text, map(printable, others))
    found.changes = {own[called[t]]: replace(change, target=own[called[t]]) for t, change in found.changes.items()}
    return replace(manner, architecture=wanted.architecture, notes=wanted.notes)


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


def layer_of(name: str, change: Change) -> Layer:
    """A layer of a change's shape, without values: for its name alone."""

    def none() -> Tensor:
        raise AssertionError("it has no values yet")

    rows, columns = change.layer
    up: Any = Derived((rows, 1), (), none)
    down: Any = Derived((1, columns), (), none)
    return Layer(name, change.kind, LowRank(up, down, 1.0, turnable=True, kernel=change.kernel))
