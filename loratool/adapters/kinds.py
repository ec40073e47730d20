"""Which kinds of models an adapter can be of, by the names and shapes of what it changes."""

from __future__ import annotations

from collections.abc import Collection

from loratool.adapters.adapter import Adapter, Flattened
from loratool.layouts.diffusion.kinds import LANGUAGE, OF_LANGUAGE, models_of


def kinds_of_adapter(adapter: Adapter) -> frozenset[str]:
    """The models that an adapter may be of; none where its names do not tell."""
    found = models_of((t, update.shape, isinstance(t, Flattened)) for t, update in adapter.updates.items())
    if found or adapter.format == "named" or adapter.component:
        return found
    return frozenset({LANGUAGE}) if any(map(OF_LANGUAGE.match, adapter.updates)) else found


def image_models(kinds: Collection[str]) -> tuple[str, ...]:
    """The image and video models among them, in order; none where it may be of a language model as well."""
    return () if LANGUAGE in kinds else tuple(sorted(kinds))
