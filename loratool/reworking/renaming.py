"""Adapters in several dialects, or of a base whose weights have two names each, as adapters with the same names.

What a weight is called is looked up in the tables of known architectures; where dialects divide layers in other ways,
layers are cut and joined as `converting.rows` has it, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapters.layers import Contents
from loratool.algebra.lowrank.products import Product
from loratool.errors import FitError, printable
from loratool.layouts.diffusion.known import ARCHITECTURES
from loratool.lazy import torch
from loratool.notes import Note
from loratool.reworking.converting.naming import LAYOUTS, Reading, by_width, hint_of, readings, respelled, same_layout
from loratool.reworking.converting.rows import narrowed
from loratool.reworking.dialects import dialect_of, renamed

OF_IMAGES = LAYOUTS.keys() - {"peft"}


def named_alike(sources: Sequence[Contents]) -> list[Contents]:
    """The same adapters, all in the names of the first one's dialect.

    Raises `FitError` where these are not known: no architecture has the weights of all.
    """
    dialects = [dialect_of(source) for source in sources]
    if not set(dialects) <= OF_IMAGES:  # targets of others are the names of one model in memory
        return list(sources)
    known = [readings(source.layers) for source in sources]
    styles = {
        (one_style(source, dialect), found[0].layout if found else "")
        for source, dialect, found in zip(sources, dialects, known, strict=True)
    }
    if len(styles) == 1 and next(iter(styles))[0] != "":
        return list(sources)
    architecture, notes = common(sources, known)
    if not architecture:
        raise FitError(
            "these names of weights are of several dialects, and no architecture that is known "
            f"({', '.join(ARCHITECTURES)}) has all of them:",
            (f"{source.name}: {printable(next(iter(source.layers), 'no low-rank update'))}" for source in sources),
        )
    found = [in_dialect(source, dialects[0], architecture) for source in sources]
    first = found[0].adapter
    return [replace(found[0], adapter=replace(first, notes=(*first.notes, *notes))), *found[1:]]


def in_dialect(source: Contents, dialect: str, architecture: str) -> Contents:
    """An adapter with the layers that a dialect has, those that are parts of others at the rank that they need."""

    def load(target: str) -> Product:
        return source.layers[target].load_factors(torch.device("cpu"), torch.float32)

    wanted = respelled(source.layers, dialect, architecture, architecture)
    found = renamed(source, narrowed(wanted.targets, source.layers, load))
    return replace(found, adapter=replace(found.adapter, dialects=(dialect,)))


def one_style(source: Contents, dialect: str) -> str:
    """The dialect in which all of an adapter's targets are named; empty where they are not."""
    return dialect if all(same_layout(target, dialect) == target for target in source.layers) else ""


def common(sources: Sequence[Contents], known: Sequence[Sequence[Reading]]) -> tuple[str, tuple[Note, ...]]:
    """The architecture that all adapters are of; of several the one that headers, widths or else the table put first."""
    each = [{reading.architecture for reading in found} for found in known]
    names = [name for name in ARCHITECTURES if all(name in found for found in each)]
    said = {hint_of(source) for source in sources}
    wide = set[str]().union(*(by_width(source.layers) for source in sources))
    sure = [name for name in names if name in said] or [name for name in names if name in wide]
    if sure or len(names) < 2:
        return (sure or names or [""])[0], ()
    text = f"their modules are those of {', '.join(names)}; {names[0]} is assumed"
    return names[0], (Note("architecture-assumed", text),)
