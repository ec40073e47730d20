"""Under which names the base has the weights that an adapter changes, whatever dialect the adapter is spelled in.

Weights that some releases fuse are named by their parts, with rows counted from the first of each part: those of known image
models as diffusers names them, those of language models as most of them do (`q_proj`, `gate_proj`, each expert).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loratool.adapters.adapter import Flattened
from loratool.adapters.formats import NAMED
from loratool.adapters.layers import Contents, Kind
from loratool.errors import LoratoolError
from loratool.files.checkpoint import Checkpoint
from loratool.grouping import by_key
from loratool.reworking.converting.fusing import split
from loratool.reworking.converting.naming import (
    DIFFUSERS,
    Divided,
    chosen,
    dotted,
    hint_of,
    looked_up,
    readings,
)
from loratool.reworking.converting.rows import Rows, Target

Origin = Literal[
    "base", "as stored"
]  # where names are from: the base's own, or the adapter's, which others may not have
LANGUAGE = ("model.", "language_model.", "transformer.h.")  # how names of no image model begin


@dataclass(frozen=True)
class Part:
    """Some rows of a layer that is read, as rows `at` … of a weight of the base."""

    name: str
    at: int
    rows: Rows


@dataclass(frozen=True)
class BaseNames:
    """The parts that the layers of an adapter consist of."""

    origin: Origin
    parts: tuple[Part, ...]

    def by_layer(self) -> dict[str, list[Part]]:
        """The parts of each layer."""
        return by_key((part.rows.target, part) for part in self.parts)


def base_names(contents: Contents, base: Checkpoint | None) -> BaseNames:
    """The weights of the base that an adapter changes; `base` tells what neither names nor tables do."""
    layers = contents.layers
    config: Mapping[str, Any] = base.config if base is not None else {}
    found = [] if all(target.startswith(LANGUAGE) for target in layers) else readings(layers)
    if found:
        reading, _ = chosen(found, layers, hint_of(contents))
        try:
            return BaseNames("base", tuple(parts_of(Divided(reading, DIFFUSERS, layers, frozenset(layers)).targets())))
        except LoratoolError:  # its rows are not those of the architecture
            return BaseNames("as stored", tuple(parts_of({t: Target.same(layer) for t, layer in layers.items()})))
    origin: Origin = "base"
    names = dotted(base)
    targets: dict[str, Target] = {}
    for target, layer in layers.items():
        name = looked_up(target, names) if names else target
        if name == target and (isinstance(target, Flattened) or contents.adapter.format == NAMED.name):
            origin = "as stored"
        try:
            targets |= split({target: layer}, config)[0] if name == target else {name: Target.same(layer)}
        except LoratoolError:  # how its rows are divided depends on the model
            origin = "as stored"
            targets[name] = Target.same(layer)
    return BaseNames(origin, tuple(parts_of(targets)))


def parts_of(targets: Mapping[str, Target]) -> Iterator[Part]:
    """The rows of layers; a matrix of several experts has the number of the expert in its name."""
    for name, target in targets.items():
        for expert, at, rows in target.places:
            if rows.target:
                yield Part(f"{name}#{expert}" if target.kind is Kind.PARAMETER else name, at, rows)
