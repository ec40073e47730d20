"""What is seen of a merge's weights while their bytes go by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from loratool.files.seen import Seen, summed
from loratool.merging.output_layout import Span

Effect = tuple[int, str]  # an update: the number of its adapter, and its target


@dataclass
class Totals:
    """What was seen while the bytes went by, by all threads."""

    # ‖W‖² and ‖ΔW‖² of every edited tensor, as far as its rows were seen; the second is 0 where something replaces W
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and inf that the base itself holds
    effective: set[Effect] = field(default_factory=set)  # the updates that change an element by themselves
    # of sampled rows of every edited tensor, by module: ⟨W' − W, ΔW⟩ and ‖ΔW‖², whose ratio is the gain
    kept: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    # of every weight that was packed anew: ‖W' − (W + ΔW)‖² and ‖ΔW‖², whose ratio is the error added
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    changed: bool = False

    def of(self, spans: Iterable[Span], device: str = "") -> Seen:
        """The part of it that is about some tensors; `device` is the kind that computed them."""
        spans = [*spans]
        names = [span.placed.name for span in spans]
        return Seen(
            changed=self.changed,
            device=device,
            norms={n: pair for n in names if (pair := self.norms.get(n)) and all(map(math.isfinite, pair))},
            kept=summed(self.kept.get(name, {}) for name in names),
            lost={name: self.lost[name] for name in names if name in self.lost},
            nonfinite={name: self.nonfinite[name] for name in names if name in self.nonfinite},
            effective=sorted(effects_in(spans) & self.effective),
        )


def effects_in(spans: Iterable[Span]) -> set[Effect]:
    """The updates that edit some tensors."""
    return {(edit.adapter, edit.target) for span in spans for edit in span.edits}


@dataclass
class BlockSeen:
    """What was seen of a block of rows."""

    weight: float = 0.0  # ‖W‖²
    change: float = 0.0  # ‖ΔW‖², or the block's share of that of all rows
    largest: float = 0.0  # no element of the result is larger in size
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # of sampled rows: module → as `Totals.kept`
    changed: bool = False  # whether all updates of it together change an element, where that is found out with the rest
    nonfinite: int = 0  # NaN and inf that the base itself holds
