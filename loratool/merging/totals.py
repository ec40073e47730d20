"""What is seen of a merge's weights while their bytes go by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Effect = tuple[int, str]  # an update: the number of its adapter, and its target


@dataclass
class Totals:
    """What was seen while the bytes went by."""

    # ‖W‖² and ‖ΔW‖² of every edited tensor, as far as its rows were seen; the second is 0 where something replaces W
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    measured: set[Effect] = field(default_factory=set)  # the updates that were looked at
    effective: set[Effect] = field(default_factory=set)  # those of them that change an element by themselves
    # of sampled rows of every edited tensor, by module: ⟨W' − W, ΔW⟩ and ‖ΔW‖², whose ratio is the gain
    kept: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    # of every weight that was packed anew: ‖W' − (W + ΔW)‖² and ‖ΔW‖², whose ratio is the error added
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    changed: bool = False
    gpu_memory: int = 0  # bytes

    def norms_of(self, names: Iterable[str]) -> dict[str, tuple[float, float]]:
        """‖W‖² and ‖ΔW‖² of those of some tensors that were edited, where both are finite."""
        found = {name: self.norms[name] for name in names if name in self.norms}
        return {name: pair for name, pair in found.items() if all(map(math.isfinite, pair))}

    def kept_in(self, names: Iterable[str]) -> dict[str, tuple[float, float]]:
        """The same by module alone, of some tensors."""
        return summed(self.kept.get(name, {}) for name in names)


@dataclass
class Seen:
    """What was seen of a block of rows."""

    weight: float = 0.0  # ‖W‖²
    change: float = 0.0  # ‖ΔW‖²
    largest: float = 0.0  # no element of the result is larger in size
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # of sampled rows: module → as `Totals.kept`


def summed(tables: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Pairs of numbers of the same name, added up."""
    found: dict[str, tuple[float, float]] = {}
    for table in tables:
        for name, (one, other) in table.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + one, before[1] + other
    return found
