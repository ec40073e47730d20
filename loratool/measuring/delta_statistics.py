"""An update against the weight of the base that it changes: how large it is there, and what of it survives rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.adapters.adapter import load_update
from loratool.adapters.writer import torch_dtype
from loratool.algebra.lowrank.products import Product, decompose
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.dora import Magnitude
from loratool.bases.decoded import weight_of
from loratool.bases.edits import rows_at
from loratool.bases.weights import Held, Room
from loratool.errors import printable
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.measuring.sampling import sample
from loratool.results.values import MeasuredOnBase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from loratool.algebra.updates.base import Update
    from loratool.bases.binding import Place
    from loratool.bases.weights import Slice
    from loratool.files.checkpoint import Checkpoint

BLOCK = 4 << 20  # bytes of float32 weight that are looked at together
SAMPLED_ENTRIES = 1 << 20  # of one weight: rounding is tried on as many rows as hold them


def measure_on_base(
    target_norm: float, places: Sequence[Place], base: Checkpoint, device: torch.device
) -> MeasuredOnBase | None:
    """Measure an update of a Frobenius norm where it lands; None where no file holds that weight as finite floats.

    Every byte of the weight is read once for the norms; rounding is tried on evenly spread rows.
    """
    import torch

    places = [place for place in places if place.tensor in base.tensors]
    stored = [rows_at(place, weight_of(base, place.tensor)) for place in places]
    if not places or any(each.dtype not in FLOAT_NAMES for each in stored):
        return None
    rounding = Rounding(stored[0].dtype)
    whole = all(place.update is places[0].update and place.columns == places[0].columns for place in places)
    basis = subspaces(places[0].update) if whole else None
    squared, core = 0.0, torch.zeros((), dtype=torch.float64)
    held = {place.tensor: Held() for place in places}
    with OpenSources() as sources:
        for place, weight in zip(places, stored, strict=True):
            room = Room(sources, held=held[place.tensor])
            sums, part = pass_over(weight, place.update_row, basis, device, room)
            squared += sums
            core = core + part
            rounding.try_on(place, weight, device, SAMPLED_ENTRIES // len(places), room)
    if not math.isfinite(squared):
        return None
    projected = float(core.square().sum()) if basis is not None else 0.0
    return MeasuredOnBase(
        tensor=printable(places[0].tensor),
        dtype=stored[0].dtype,
        rows=sum(place.rows for place in places),
        norm=math.sqrt(squared),
        ratio=target_norm / math.sqrt(squared) if squared else None,
        amplification=target_norm / math.sqrt(projected) if projected else None,
        unchanged=rounding.same / rounding.changed if rounding.changed else None,
        gain=rounding.gain,
        sampled_rows=rounding.rows,
    )


def low_rank(update: Update) -> LowRank | None:
    inner = update.inner if isinstance(update, Magnitude) else update
    return inner if isinstance(inner, LowRank) else None


def subspaces(update: Update) -> tuple[Tensor, Tensor] | None:
    """(U, Vᵀ) of an update the way round that the base stores its weight; None for one of experts."""
    import torch

    factors = low_rank(update)
    if factors is None:
        return None
    loaded = load_update(factors, torch.device("cpu"), torch.float64)
    found = decompose(Product(loaded.up, loaded.down))
    kept = max(1, found.significant)
    return found.left[:, :kept].float(), found.right[:kept].float()


def blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the parts that a matrix is read in."""
    step = max(1, BLOCK // (4 * max(width, 1)))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def pass_over(
    weight: Slice, update_row: int, basis: tuple[Tensor, Tensor] | None, device: torch.device, room: Room
) -> tuple[float, Tensor]:
    """‖W0‖² and UᵀW0V of a weight; its first row is row `update_row` of the update."""
    import torch

    squared, core = 0.0, torch.zeros((), dtype=torch.float64)
    left, right = (side.to(device) for side in basis) if basis else (None, None)
    for first, count in blocks(weight.count, weight.whole.shape[1]):
        rows = weight.rows(first, count, device, torch.float32, room)
        squared += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        if left is not None and right is not None:
            at = first + update_row
            core = core + (left[at : at + count].T @ (rows @ right.T)).double().cpu()
    return squared, core


@dataclass
class Rounding:
    """What becomes of W0 + ΔW when it is rounded to the dtype of W0, counted over some rows."""

    dtype: str
    rows: int = 0
    changed: int = 0  # entries that ΔW would change
    same: int = 0  # of those, the ones that are as before
    product: float = 0.0  # ⟨rounded − W0, ΔW⟩
    squared: float = 0.0  # ‖ΔW‖²

    @property
    def gain(self) -> float | None:
        """The part of ΔW that comes through; None where ΔW is zero, or the sum leaves the dtype's range."""
        return self.product / self.squared if self.squared and math.isfinite(self.product) else None

    def try_on(self, place: Place, weight: Slice, device: torch.device, entries: int, room: Room) -> None:
        """Round some rows of a place, in float32."""
        import torch

        loaded = load_update(low_rank(place.update) or place.update, device, torch.float32)
        stored = torch_dtype(self.dtype)
        for first, count in sample(place.rows, max(1, entries // max(weight.whole.shape[1], 1))):
            rows = weight.rows(first, count, device, torch.float32, room)
            delta = torch.zeros_like(rows)
            loaded.add_rows(delta, first + place.update_row, 1.0, rows)
            applied = ((rows + delta).to(stored).float() - rows).double()
            wide = delta.double()
            self.rows += count
            self.changed += int((delta != 0).sum())
            self.same += int(((applied == 0) & (delta != 0)).sum())
            self.product += float((applied * wide).sum())
            self.squared += float(wide.square().sum())
