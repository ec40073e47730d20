"""Edited spans on their way through the workers: what they share of each, and what is seen of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from loratool.bases.weights import Held
from loratool.files.seen import summed
from loratool.lazy import torch
from loratool.merging.output_layout import Span
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.totals import BlockSeen, Totals, effects_in

if TYPE_CHECKING:
    from loratool.merging.loaded_edits import LoadedEdits


class EditedSpan:
    """A span on its way through the workers, with its factors loaded once per device."""

    def __init__(self, span: Span, totals: Totals, shared: SharedUpdates) -> None:
        self.span, self.totals, self.shared = span, totals, shared
        self.lock, self.held = threading.Lock(), Held()
        self.waiting = effects_in([span])  # updates that have changed nothing so far

    def edits_on(self, device: torch.device) -> LoadedEdits:
        """The edits ready to apply on `device`."""
        from loratool.merging.loaded_edits import load_edits  # with all that torch computes

        return self.held.of(("edits", device), lambda: load_edits(self.span, self.shared, device))

    def look_for_effects(self, loaded: LoadedEdits, before: torch.Tensor, first: int, after: torch.Tensor) -> None:
        """Note which updates change an element of some rows, from `first` on, and whether all of them together do."""
        from loratool.merging.loaded_edits import has_effect, is_changed

        effective = self.totals.effective
        self.waiting = self.waiting - effective
        alone = len(self.span.edits) == 1
        changed = (alone or not self.totals.changed) and is_changed(before, after)
        if changed:
            self.totals.changed = True  # never set to False: another worker may have seen a change meanwhile
        for effect in self.waiting:
            if effect not in effective and (changed if alone else has_effect(loaded.only(effect), before, first)):
                effective.add(effect)

    def merged(self, block: BlockSeen) -> None:
        """Account for a block of rows, or for all of them."""
        name = self.span.placed.name
        with self.lock:
            self.totals.kept[name] = summed([self.totals.kept.get(name, {}), block.kept])
            if block.nonfinite:
                self.totals.nonfinite[name] = self.totals.nonfinite.get(name, 0) + block.nonfinite
            if block.changed:
                self.totals.changed = True
                self.totals.effective |= self.waiting
            if self.span.edits:
                before = self.totals.norms.get(name, (0.0, 0.0))
                self.totals.norms[name] = before[0] + block.weight, before[1] + block.change
