"""What is seen of a merge's weights while their bytes go by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

Effect = tuple[int, str]  # an update: the number of its adapter, and its target


@dataclass
class Totals:
    """What was seen while the bytes went by."""

    weight_norm: dict[str, float] = field(default_factory=dict)  # ‖W‖ of every edited tensor
    delta_norm: dict[str, float] = field(default_factory=dict)  # ‖ΔW‖ of it; 0 where something replaces the weight
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    measured: set[Effect] = field(default_factory=set)  # the updates that were looked at
    effective: set[Effect] = field(default_factory=set)  # those of them that change an element by themselves
    changed: bool = False
    gpu_memory: int = 0  # bytes

    def ratios(self, names: Iterable[str]) -> dict[str, float]:
        """‖ΔW‖/‖W‖ of those of some tensors that were edited, where both are finite and W is not zero."""
        found = {name: (self.delta_norm[name], self.weight_norm[name]) for name in names if name in self.delta_norm}
        return {
            name: delta / weight
            for name, (delta, weight) in found.items()
            if math.isfinite(delta) and math.isfinite(weight) and weight > 0
        }
