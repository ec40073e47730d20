"""An update against the weight of the base that it changes: how large it is there, and what of it survives rounding."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.adapters.adapter import StoredTensor, load_update
from loratool.adapters.writer import torch_dtype
from loratool.algebra.lowrank import Product, decompose
from loratool.algebra.updates import LowRank, Magnitude
from loratool.bases.tied_weights import on_disk
from loratool.errors import printable
from loratool.files.safefile import FLOAT_NAMES
from loratool.results.values import Weighed
from loratool.templates import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from loratool.algebra.updates import Update
    from loratool.bases.binding import Place
    from loratool.files.checkpoint import Checkpoint

LARGEST_RATIO = 1.0  # ‖ΔW‖/‖W‖; fine-tuning stays far below it
BLOCK = 4 << 20  # bytes of float32 weight that are looked at together
SAMPLED_ENTRIES = 1 << 20  # of one weight: rounding is tried on as many rows as hold them


def weigh(target_norm: float, places: Sequence[Place], base: Checkpoint, device: torch.device) -> Weighed | None:
    """Measure an update of a Frobenius norm where it lands; None where no file holds that weight as finite floats.

    Every byte of the weight is read once for the norms; rounding is tried on evenly spread rows.
    """
    import torch

    held = {name for shard in base.shards for name in shard.tensors}
    places = [place for place in places if place.tensor in held]
    stored = [as_matrix(on_disk(base, place.tensor), place.fold) for place in places]
    if not places or any(each.info.dtype not in FLOAT_NAMES for each in stored):
        return None
    rounding = Rounding(stored[0].info.dtype)
    whole = all(place.update is places[0].update and place.columns == places[0].columns for place in places)
    basis = subspaces(places[0].update) if whole else None
    squared, core = 0.0, torch.zeros((), dtype=torch.float64)
    for place, matrix in zip(places, stored, strict=True):
        sums, part = pass_over(place, matrix, basis, device)
        squared += sums
        core = core + part
        rounding.try_on(place, matrix, device, SAMPLED_ENTRIES // len(places))
    if not math.isfinite(squared):
        return None
    projected = float(core.square().sum()) if basis is not None else 0.0
    return Weighed(
        tensor=printable(places[0].tensor),
        dtype=stored[0].info.dtype,
        rows=sum(place.rows for place in places),
        norm=math.sqrt(squared),
        ratio=target_norm / math.sqrt(squared) if squared else None,
        amplification=target_norm / math.sqrt(projected) if projected else None,
        unchanged=rounding.same / rounding.changed if rounding.changed else None,
        gain=rounding.gain,
        sampled_rows=rounding.rows,
    )


def as_matrix(tensor: StoredTensor, fold: int) -> StoredTensor:
    """The tensor with its first `fold` dimensions as rows."""
    rows = math.prod(tensor.info.shape[:fold])
    flat = dataclasses.replace(tensor.info, shape=(rows, tensor.info.elements // max(rows, 1)))
    return dataclasses.replace(tensor, info=flat)


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


def blocks(place: Place, width: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the parts that a place is read in."""
    step = max(1, BLOCK // (4 * max(width, 1)))
    for first in range(place.first_row, place.first_row + place.rows, step):
        yield first, min(step, place.first_row + place.rows - first)


def pass_over(
    place: Place, matrix: StoredTensor, basis: tuple[Tensor, Tensor] | None, device: torch.device
) -> tuple[float, Tensor]:
    """‖W0‖² and UᵀW0V of the rows and columns of a place."""
    import torch

    width = matrix.info.shape[1]
    squared, core = 0.0, torch.zeros((), dtype=torch.float64)
    left, right = (side.to(device) for side in basis) if basis else (None, None)
    for first, count in blocks(place, width):
        weight = matrix.load_rows(first, count, device, torch.float32)[:, place.columns]
        squared += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        if left is not None and right is not None:
            at = first - place.first_row + place.update_row
            core = core + (left[at : at + count].T @ (weight @ right.T)).double().cpu()
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

    def try_on(self, place: Place, matrix: StoredTensor, device: torch.device, entries: int) -> None:
        """Round some rows of a place, in the float32 arithmetic of a merge."""
        import torch

        update = low_rank(place.update) or place.update
        loaded = load_update(update, device, torch.float32)
        width = matrix.info.shape[1]
        stored = torch_dtype(self.dtype)
        for first, count in sample(place.first_row, place.rows, max(1, entries // max(width, 1))):
            whole = matrix.load_rows(first, count, device, torch.float32)
            weight = whole[:, place.columns]
            delta = torch.zeros_like(weight)
            loaded.add_rows(delta, first - place.first_row + place.update_row, 1.0, weight)
            applied = ((weight + delta).to(stored).float() - weight).double()
            wide = delta.double()
            self.rows += count
            self.changed += int((delta != 0).sum())
            self.same += int(((applied == 0) & (delta != 0)).sum())
            self.product += float((applied * wide).sum())
            self.squared += float(wide.square().sum())


PARTS = 16  # runs of rows that a sample is read in


def sample(first: int, rows: int, wanted: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of evenly spread runs that are `wanted` rows together, or of all rows."""
    if rows <= wanted:
        yield first, rows
        return
    parts = min(PARTS, wanted)
    each = wanted // parts
    for part in range(parts):
        yield first + part * rows // parts, each


def larger(ratios: Mapping[str, float]) -> str:
    """What to say of updates that are larger than their weights; `ratios` are ‖ΔW‖/‖W‖ by name."""
    return (
        f"‖ΔW‖ is up to {max(ratios.values()):.3g} times ‖W‖ in {listed(ratios)}; an α or a scale is probably wrong, or "
        "this is not the base that the adapter was trained on"
    )
