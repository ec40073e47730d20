"""Which tensor of the base, or which rows of one, a target means.

Decided from names and shapes on disk and from the tables of `layouts`: `resolving` finds the tensors (`flattened` those
of names without dots), `fusing` the rows of them, `orientation` which way round they are stored; `checking` looks at
all of it together, and `telling` puts it in words. `in_model` does all that in one model, and `in_components` in each
component of an image or video model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.bases.binding.checking import overlap
from loratool.bases.binding.in_model import bind_model, mapped_of
from loratool.bases.binding.places import ALL, Bound, Place
from loratool.bases.binding.resolving import Renaming
from loratool.bases.binding.telling import tell
from loratool.errors import FitError, UsageError, about, printable
from loratool.files.checkpoint import Checkpoint
from loratool.layouts.diffusion.words import may_be_of_images
from loratool.notes import Note
from loratool.templates import fill, grouped, listed, template_of

__all__ = ["ALL", "Bound", "Place", "bind", "fill", "grouped", "listed", "overlap", "read_maps", "tell", "template_of"]


def bind(adapter: Adapter, base: Checkpoint, *, maps: Sequence[str] = (), fan_in_fan_out: bool | None = None) -> Bound:
    """Find the place of every target of `adapter`, from the names and shapes of the base's tensors alone.

    Args:
        adapter: its updates are fitted here to how the base stores its weights.
        base: only its headers and its config are looked at.
        maps: `REGEX=TEMPLATE` each; the first whose pattern is found in a target's name gives it another name.
        fan_in_fan_out: whether square weights that may be Conv1D are stored (in, out); by default the class of
            the model decides, then the config of the adapter.

    Raises:
        FitError: the adapter is of another kind of model than the base.
    """
    if base.is_gguf:
        from loratool.bases.binding.named import named

        if (view := named(base)) is not None:
            return view.in_file(bind(adapter, view, maps=maps, fan_in_fan_out=fan_in_fan_out))
    renamings = read_maps(maps)
    if base.components or may_be_of_images(base.tensors):
        from loratool.bases.binding.in_components import bind_components  # which knows many models

        bound = bind_components(adapter, base, renamings, fan_in_fan_out)
    else:
        bound = bind_model(adapter, base, renamings, fan_in_fan_out)
    if bound.problems:
        from loratool.bases.binding.unlike import unlike_kinds  # likewise

        if why := unlike_kinds(adapter, base):
            with about(adapter.folder):
                raise FitError(f"{adapter.name}: {why}")
    notes = list(bound.notes)
    mapped = mapped_of(adapter.updates, renamings)
    for text, (pattern, _) in zip(maps, renamings, strict=True):
        if not any(map(pattern.search, mapped)):
            notes.append(
                Note(
                    "map-unused",
                    f"--map {printable(repr(text))} matches no weight name of this adapter; names are matched without PEFT's prefix",
                )
            )
    template_of.cache_clear()
    return replace(bound, notes=tuple(notes))


def read_maps(maps: Iterable[str]) -> list[Renaming]:
    """`REGEX=TEMPLATE` texts as patterns and replacements; the last `=` divides them."""
    found: list[Renaming] = []
    for text in maps:
        pattern, divided, replacement = text.rpartition("=")
        try:
            if not divided or not pattern:
                raise re.error("the '=' is missing" if not divided else "the pattern is empty")
            expression = re.compile(pattern)
            re.compile(f"{pattern}|").sub(replacement, "")  # a template of groups that the pattern has not
            found.append((expression, replacement))
        except (re.error, IndexError) as error:
            raise UsageError(f"--map {printable(repr(text))}: expected REGEX=TEMPLATE: {printable(error)}") from None
    return found
