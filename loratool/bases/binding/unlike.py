"""Whether an adapter is of another kind of model than a base, which is then said in one sentence."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.kinds import kinds_of_adapter
from loratool.bases.binding.components import components_of
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.kinds import LANGUAGE, OF_LANGUAGE, models_of
from loratool.results.text import one_of


def unlike_kinds(adapter: Adapter, base: Checkpoint) -> str:
    """That an adapter is of another kind than a base, and the way out; empty where it is not known to be.

    Told by names, and for versions of Stable Diffusion by the width of their text.
    """
    own, there = kinds_of_adapter(adapter), kinds_of_base(base)
    if not own or not there or own & there:
        return ""
    return (
        f"this is an adapter of {one_of(sorted(own))}, but BASE is {one_of(sorted(there))}; pass the model that it was trained on, or one made "
        "from that"
    )


def kinds_of_base(base: Checkpoint) -> frozenset[str]:
    """The models that a base may be; none where its names do not tell."""
    parts = components_of(base)
    for part in parts:
        if part.is_denoiser:
            return models_of((name, info.shape, False) for name, info in part.model.tensors.items())
    is_language = not parts and any(map(OF_LANGUAGE.match, base.tensors))
    return frozenset({LANGUAGE}) if is_language else frozenset()
