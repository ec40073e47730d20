"""Adapters that are the same update in other clothes, told by their sketches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.algebra.sketching import tolerance
from loratool.lazy import NDArray, numpy as np
from loratool.results.sketch import SketchFacts

BLOCK = 512  # adapters that are compared with all others at a time
ROOM = 1e-6  # relative: how far a distance from inner products may be off before it is computed from the difference


@dataclass(frozen=True)
class Sketched:
    """A sketch that is kept to be compared."""

    values: NDArray[Any]  # (m,), float32
    facts: SketchFacts


def is_same(one: SketchFacts, other: SketchFacts, distance: float) -> bool:
    """Whether two updates at a distance are the same but for rounding; untrained ones, which are zero, are not."""
    if one.names != other.names or not (one.norm and other.norm):
        return False
    return distance <= tolerance((one.norm, other.norm), (one.rounding, other.rounding))


def twins(sketches: Sequence[Sketched]) -> Iterator[tuple[int, int]]:
    """Every two that are the same update, the first before the second."""
    if len(sketches) < 2:
        return
    values = np.stack([each.values for each in sketches]).astype(np.float64)
    squares = (values * values).sum(1)
    # No distance within tolerance is larger than this; what is near enough is measured again, from the difference.
    most = np.array([tolerance([s.facts.norm], [s.facts.rounding] * 2) + ROOM * s.facts.norm for s in sketches])
    for start in range(0, len(sketches), BLOCK):
        stop = start + BLOCK
        near = squares[start:stop, None] + squares - 2 * (values[start:stop] @ values.T)
        limit = (most[start:stop, None] + most) ** 2
        for i, j in zip(*np.nonzero(near <= limit), strict=True):
            one = start + int(i)
            if one < int(j):
                distance = float(np.linalg.norm(values[one] - values[int(j)]))
                if is_same(sketches[one].facts, sketches[int(j)].facts, distance):
                    yield one, int(j)
