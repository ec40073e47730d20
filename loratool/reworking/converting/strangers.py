"""Adapters of language models, for which the dialects of image and video models have no names."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import DIALECTS, NAMED, WRITTEN, format_of
from loratool.errors import InputError, printable
from loratool.layouts.diffusion.known import ARCHITECTURES
from loratool.reworking.converting.naming import (
    DIFFUSERS,
    LAYOUTS,
    ORIGINAL,
    found_in,
    same_layout,
)
from loratool.templates import grouped


def check_has_names(adapter: Adapter, dialect: str) -> None:
    """Raise `InputError` where a dialect of image models has no name for any module of an adapter.

    Files that tools for image models wrote are left to the tables of names, which say more.
    """
    if dialect not in LAYOUTS or DIALECTS[dialect] is WRITTEN or format_of(adapter) is NAMED:
        return
    targets = [*adapter.updates, *adapter.bases]
    if not targets or any(is_known(target, dialect) for target in targets):
        return
    words = [word for word, form in DIALECTS.items() if form is not NAMED and word in form.dialects[:1]]
    raise InputError(
        f"{printable(adapter.file.path)}: {dialect} is a dialect of image and video models ({', '.join(ARCHITECTURES)}), "
        f"and no module of this adapter is one of theirs. Adapters of language models are written with --to "
        f"{', '.join(words[:-1])} or {words[-1]}. Its modules are:",
        grouped(map(printable, targets)),
        hint="loratool help dialects",
    )


def is_known(target: str, dialect: str) -> bool:
    """Whether a module is one of a known architecture, or has the layout of a dialect anyway."""
    layouts = (DIFFUSERS, ORIGINAL)
    return same_layout(target, dialect) is not None or any(
        found_in(target, architecture, layout) is not None for architecture in ARCHITECTURES for layout in layouts
    )
