"""What `convert` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import printable
from loratool.notes import Note
from loratool.results.base import Written
from loratool.results.text import aligned, cost_rows, counts, percent, spread, worst_first


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of the input, and what became of it."""

    written: tuple[str, ...]  # the layers of the output that hold it
    scale: float  # of its factors, before
    factor: float  # by which its second factor was multiplied, 1 where it was not
    norm: float | None  # ‖ΔW‖; None where both have the same bytes
    error: float | None  # ‖ΔW − ΔW'‖ / ‖ΔW‖, as read back; None after a dry run
    approximated: str = ""  # why the error may be more than rounding


@dataclass(frozen=True, repr=False)
class ConvertReport(Written):
    """What `convert` did. Times are seconds."""

    out: Path
    written: bool
    source: str  # the dialect of the input
    dialect: str  # of the output
    server: str  # that it was made for, with its release; empty for none
    modules: Mapping[str, ConvertedLayer]  # by target of the input
    layers: int  # of the output
    ranks: Mapping[str, int]  # of the output's layers
    dtype: str
    beside: Mapping[str, float]  # the same error of what is no layer: biases, tensors saved whole, token rows
    worst: str  # the target with the largest error, of either; empty where none was measured
    lost: tuple[Note, ...]  # what the output does not hold
    notes: tuple[Note, ...]

    def text(self) -> str:
        """What was written, and how far it is from what was read."""
        rows: list[tuple[str, object]] = [
            ("converted into" if self.written else "would write", printable(self.out)),
            ("dialect", f"{self.source} → {self.dialect}{f', for {self.server}' if self.server else ''}"),
            ("layers", f"{self.layers}" + (f" (was {len(self.modules)})" if self.layers != len(self.modules) else "")),
            ("rank", spread(counts(self.ranks.values()))),
            ("factors", f"{self.dtype}{self.folded}"),
            *self.proof(),
            *cost_rows(self.cost),
            *(("lost", note) for note in self.lost),
            *(("note", note) for note in self.notes),
        ]
        approximated = {t: layer for t, layer in self.modules.items() if layer.approximated}
        if not approximated:
            return aligned(rows)
        layers = worst_first(
            ["error", "why", "layer"],
            approximated,
            lambda layer: layer.error or 0.0,
            lambda layer: [percent(layer.error or 0.0), layer.approximated],
        )
        return f"{aligned(rows)}\n{layers}"

    @property
    def folded(self) -> str:
        """Of how many layers the second factor was multiplied."""
        count = sum(layer.factor != 1 for layer in self.modules.values())
        return f", the scale of {count} layer{'s' * (count != 1)} multiplied into B" if count else ""

    def proof(self) -> list[tuple[str, object]]:
        """The worst layer, as it was read back."""
        if not self.worst:
            return [("proof", "not read back, because nothing was written")]
        layers = self.modules.values()
        largest = self.beside[self.worst] if self.worst in self.beside else self.modules[self.worst].error
        error = f"‖ΔW − ΔW'‖ / ‖ΔW‖ = {largest:.2g}, at {printable(self.worst)}"
        if all(layer.norm is None and not layer.error for layer in layers) and not any(self.beside.values()):
            error = "every layer has the same factors, byte for byte, and the same scale"
        return [("proof", f"read back: {error}")]
