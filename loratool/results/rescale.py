"""What `rescale` did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import MOST_LAYERS, aligned, row_if


@dataclass(frozen=True)
class RescaledLayer:
    """The scale of a layer before and after: α/r, or α/√r with rsLoRA."""

    before: float
    after: float
    factor: float | None  # by which its update is multiplied; None where that was zero because of its α


@dataclass(frozen=True, repr=False)
class RescaleReport(Written):
    """What `rescale` did. Sizes are bytes, times seconds."""

    out: Path
    written: bool
    baked: bool
    modules: Mapping[str, RescaledLayer]  # by target
    norm: float | None  # ‖ΔW‖ of all layers after it, where norms were asked for
    notes: tuple[Note, ...]
    changes: Mapping[str, float] = field(default_factory=dict)  # target of a change stored in full → its factor

    def text(self) -> str:
        """What `rescale` did."""
        alike = Counter(
            (f"{m.before:.6g}", f"{m.after:.6g}", "" if m.factor is None else f" (× {m.factor:.6g})")
            for m in self.modules.values()
        )
        return aligned(
            [
                ("rescaled into" if self.written else "would write", printable(self.out)),
                *(
                    (
                        "scaling",
                        f"{before} → {after}{factor} in {count} layer{'s' * (count != 1)}"
                        + (", multiplied into the factors" if self.baked else ""),
                    )
                    for (before, after, factor), count in alike.most_common(MOST_LAYERS)
                ),
                *row_if(len(alike) > MOST_LAYERS, "", f"… and {len(alike) - MOST_LAYERS} more scalings"),
                *(
                    ("change" if count == 1 else "changes", f"× {factor:.6g} in {count} stored in full")
                    for factor, count in Counter(self.changes.values()).most_common()
                    if factor != 1
                ),
                *([("‖ΔW‖", f"{self.norm:.6g}, all layers together")] if self.norm is not None else []),
                *(("note", note) for note in self.notes),
            ]
        )
