"""Which figures of a result's page a terminal shows below its text: those that say at a glance what the text lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.pictures.drawing import Figure

# The kind of a result → names of figures of its page, in the order in which a terminal shows them.
SHOWN = {
    "AdapterFacts": ("energy-by-rank", "norm"),
    "MergePlan": ("gain",),
    "MergeReport": ("tensors", "relative-norm", "gain"),
    "StreamReport": ("tensors", "gain"),
    "ResizeReport": ("energy", "ranks"),
    "ExtractReport": ("energy", "difference"),
    "CombineReport": ("energy-by-adapter", "energy"),
    "CompareReport": ("cosine-1", "cosine-2", "cosine-3", "cosine"),
    "FleetFacts": ("norms", "ranks"),
    "Estimate": ("memory",),
}


def charts_of(result: Any) -> Iterator[Figure]:
    """The figures of one result; none where its kind has none for a terminal, and of headers alone."""
    kind = type(result).__name__
    if kind not in SHOWN or getattr(result, "values", ...) is None:
        return
    from loratool.pictures.page import page_of  # which `inspect` of headers does not wait for

    found = {figure.name: figure for figure in page_of(result).figures}
    yield from (found[name] for name in SHOWN[kind] if name in found)
