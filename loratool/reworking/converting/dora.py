"""DoRA as plain LoRA: the leading part of W' − W, which takes the base's weights.

W' = m/‖W + ΔW‖ ⊙ (W + ΔW), so W' − W is of full rank, and any LoRA of it is an approximation. It is decomposed as `extract`
decomposes the difference of two models, and what is written is held against it once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter, derived, load_update
from loratool.adapters.layers import Contents, Layer
from loratool.algebra.lowrank.products import Product
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.dora import Magnitude
from loratool.bases.weights import Room, Slice, Stacked, StoredWeight
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.open_sources import OpenSources
from loratool.lazy import Tensor, torch
from loratool.measuring.session import Session
from loratool.notes import Note
from loratool.reworking.extracting.differences import HELD, TILE, Rule, leading

if TYPE_CHECKING:
    from loratool.bases.adapter_fit import Fit
    from loratool.bases.binding import Place

WAY_OUT = "run `loratool merge` on the base and the adapter, and `loratool extract` on the result"


@dataclass
class Moved:
    """W' − W of one layer, seen some rows of the base's weight at a time, in float32 of a result in float64."""

    target: str
    weight: StoredWeight  # the base's, a matrix
    update: Update  # fitted to it
    turned: bool  # whether it is stored (in, out)
    room: int = 0  # bytes of it that may stay in memory
    held: Tensor | None = None

    device = property(lambda _: torch.device("cpu"))

    @property
    def shape(self) -> tuple[int, int]:
        """As it is stored."""
        rows, columns = self.weight.shape
        return rows, columns

    @cached_property
    def loaded(self) -> Update:
        found = load_update(self.update, self.device, torch.float64)
        return found.prepared(self.base) if found.needs_weight else found

    def base(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Rows of the base in float64."""
        rows, columns = self.shape
        last, step = rows if count is None else first + count, max(1, TILE // (8 * columns))
        with OpenSources() as sources:
            for at in range(first, last, step):
                yield at, self.weight.rows(at, min(step, last - at), self.device, torch.float64, Room(sources))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        rows, columns = self.shape
        if self.held is not None:
            step = max(1, TILE // (4 * columns))
            yield from ((at, self.held[at : at + step]) for at in range(0, rows, step))
            return
        kept = torch.empty(rows, columns) if 4 * rows * columns <= self.room else None
        for first, base in self.base():
            moved = base.clone()
            self.loaded.add_rows(moved, first, 1.0, base)
            tile = moved.sub_(base).float()
            if not bool(tile.isfinite().all()):
                raise InputError(f"{printable(self.target)}: W' of its DoRA is not finite")
            if kept is not None:
                kept[first : first + tile.shape[0]] = tile
            yield first, tile
        self.held = kept

    def decomposed(self, rank: int | None, energy: float | None) -> Product:
        """Its leading part, (out, in): of a rank, or the smallest with a fraction of ‖W' − W‖², or both."""
        limit = min(self.shape) if rank is None else min(rank, *self.shape)
        part = leading(self, limit, exact=rank is None, seed=0)
        self.held = None
        found = part.found.truncated(max(1, Rule(limit, False, energy).choose([part], limit))).product()
        return Product(found.down.mT, found.up.mT) if self.turned else found

    def apart(self, parts: Iterable[tuple[int, Product]]) -> tuple[float, float]:
        """‖W' − W‖, and how far from it products are, each of which has the layer's rows from a number on."""
        given, whole, lost = list(parts), 0.0, 0.0
        for first, tile in self.tiles():
            rest = tile.double()
            whole += float(rest.square().sum())
            for row, product in given:
                if self.turned:
                    across = product.down[:, first : first + tile.shape[0]]
                    rest[:, row : row + product.up.shape[0]] -= (product.up @ across).T
                elif (start := max(first, row)) < (stop := min(first + len(tile), row + product.up.shape[0])):
                    rest[start - first : stop - first] -= product.up[start - row : stop - row] @ product.down
            lost += float(rest.square().sum())
        return math.sqrt(whole), math.sqrt(lost)


def moved_by(adapter: Adapter, targets: Iterable[str], base: Checkpoint) -> tuple[dict[str, Moved], tuple[Note, ...]]:
    """What DoRA makes of some weights of a base. Raises `FitError` where the base has no such weights."""
    from loratool.bases.adapter_fit import fit_of

    fit = fit_of(adapter, base.root, base)
    fit.require()
    return {target: moved(target, adapter.updates[target], fit) for target in targets}, fit.notes


def moved(target: str, update: Update, fit: Fit) -> Moved:
    """The same of one weight."""
    places = sorted(fit.places[target], key=lambda place: place.update_row)
    fitted: Any = places[0].update
    assert isinstance(update, Magnitude), "it is DoRA"
    turned = fitted.by_column != update.by_column
    pieces = tuple(piece_of(place, fit) for place in places)
    one_matrix = len({piece.shape[1] for piece in pieces}) == 1 and (len(pieces) == 1 or not turned)
    if not one_matrix or sum(piece.shape[0] for piece in pieces) != fitted.shape[0]:
        raise FitError(f"{printable(target)}: the base has it in parts, for which DoRA is not supported; {WAY_OUT}")
    return Moved(target, pieces[0] if len(pieces) == 1 else Stacked(pieces), fitted, turned)


def piece_of(place: Place, fit: Fit) -> StoredWeight:
    """Some rows of a weight of the base; of a tied one that no file holds, those of the other."""
    assert fit.checkpoint is not None, "it was given"
    name = place.tensor
    if name not in fit.checkpoint.tensors and fit.ties is not None:
        name = next(group.names[0] for group in fit.ties.groups if name in group.missing)
    from loratool.bases.decoded import weight_of

    whole = weight_of(fit.checkpoint, name)
    return Slice(whole.matrix(math.prod(whole.shape[place.fold :])), place.first_row, place.rows, place.columns)


def as_lora(
    contents: Contents, moved: Mapping[str, Moved], rank: int | None, energy: float | None, at_work: Session
) -> Contents:
    """The adapter with the layers of `moved` as LoRA, whose factors stay in memory."""

    def work(target: str) -> tuple[str, Layer]:
        one = moved[target]
        one.room = HELD // at_work.workers
        return target, with_factors(contents.layers[target], one.decomposed(rank, energy))

    return replace(contents, layers={**contents.layers, **dict(at_work.spread(work, moved))})


def with_factors(layer: Layer, found: Product) -> Layer:
    """A layer of other factors, which count as stored in the dtype of its own."""
    update = layer.update
    assert isinstance(update, LowRank), "DoRA is around such"
    kept = found.up.float().contiguous(), found.down.float().contiguous()
    up = derived(tuple(kept[0].shape), lambda _: kept[0], update.up)
    down = derived(tuple(kept[1].shape), lambda _: kept[1], update.down)
    return replace(layer, update=replace(update, up=up, down=down, scale=1.0))
