"""A base whose file has names and an order of rows of its own, seen as transformers has it: GGUF.

Targets are bound in that view. What binding finds is then told in the names of the file, with rows in its order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from loratool.adapters.gguf_names import in_model, order_of
from loratool.adapters.model_settings import Heads
from loratool.algebra.updates.compound import images_in
from loratool.algebra.updates.reordered import Reordered, RowOrder
from loratool.bases.binding.places import ALL, Bound, Place
from loratool.bases.decoded import OtherNames, weight_of
from loratool.bases.weights import OfAnother, Room, StoredWeight
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile
from loratool.files.safefile import TensorInfo
from loratool.layouts.gguf import ARCHITECTURES, Architecture
from loratool.lazy import Tensor, torch


@dataclass(frozen=True)
class Row:
    """What a tensor of the file is in the model."""

    name: str
    order: RowOrder | None = None
    shifted: bool = False  # it holds 1 + w


@dataclass(frozen=True)
class InOrder(OfAnother):
    """A matrix whose rows are stored in another order."""

    order: RowOrder

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def rows(self, first: int, count: int, device: torch.device, dtype: torch.dtype, room: Room) -> Tensor:
        stored = self.order.back(self.shape[0])[first : first + count]
        start, stop = int(stored.min()), int(stored.max()) + 1  # of one head, or of few: little else is read
        return self.whole.rows(start, stop - start, device, dtype, room)[(stored - start).to(device)]


@dataclass(frozen=True, repr=False)
class Named(OtherNames):
    """A base under the names of transformers. All of its matrices are (out, in)."""

    rows: Mapping[str, Row] = field(default_factory=dict)  # by the names of the file
    held: Checkpoint = None  # type: ignore[assignment]  # always given: the same under the names of its file

    is_linear = True

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {row.name: replace(self.held.tensors[name], name=row.name) for name, row in self.rows.items()}

    @cached_property
    def in_files(self) -> Mapping[str, str]:
        """Name in transformers → name in the file."""
        return {row.name: name for name, row in self.rows.items()}

    def weight(self, name: str) -> StoredWeight:
        there = self.in_files[name]
        weight, order = weight_of(self.held, there), self.rows[there].order
        return weight if order is None or not self.is_ordered(there) else InOrder(weight, order)

    def is_ordered(self, there: str) -> bool:
        """Whether the rows of a tensor of the file, if it is a matrix, can be put into the order of transformers."""
        order, shape = self.rows[there].order, self.held.tensors[there].shape
        return order is not None and len(shape) == 2 and order.fits(shape[0])

    def in_file(self, bound: Bound) -> Bound:
        """What binding found in this view, in the names and the order of the file."""
        places: dict[str, tuple[Place, ...]] = {}
        problems = dict(bound.problems)
        for target, every in bound.places.items():
            reasons = [why for place in every if (why := self.why_not(place))]
            if reasons:
                problems[target] = reasons[0]
            else:
                places[target] = tuple(map(self.place, every))
        return replace(bound, places=places, problems=problems)

    def why_not(self, place: Place) -> str:
        """Empty where an update can be put into the file's order; else the reason it cannot."""
        name = self.in_files[place.tensor]
        row, info = self.rows[name], self.held.tensors[name]
        where = f"a GGUF file stores {printable(name)}"
        if row.shifted and place.update.replaces:
            return f"it is saved whole, but {where} with 1 added to it, which is not supported"
        if row.order is None:
            return ""
        if place.update.replaces or images_in(place.update):
            return f"it is not a sum of products, but {where} with rows in another order, which is not supported"
        if (place.first_row, place.rows, place.columns, place.fold) != (0, info.rows, ALL, 1):
            return f"it is a part of the weight, but {where} with rows in another order, which is not supported"
        if not row.order.fits(info.rows):
            return f"{where} in {info.rows} rows, which do not fit the {row.order.groups} heads of its metadata"
        return ""

    def place(self, place: Place) -> Place:
        """The same place in the file."""
        name = self.in_files[place.tensor]
        order = self.rows[name].order
        if order is None:
            return replace(place, tensor=name)
        update = Reordered(place.update, order, place.rows, place.update_row)
        return replace(place, tensor=name, update=update, update_row=0)


def named(base: Checkpoint) -> Named | None:
    """A base with names of its own under those of transformers; None for any other base.

    Raises `InputError` where it is of an architecture that is not known here.
    """
    first = base.shards[0] if base.shards else None
    if not isinstance(first, GgufFile) or isinstance(base, Named):
        return None
    kind = first.text("general.architecture")
    if (architecture := ARCHITECTURES.get(kind)) is None:
        raise InputError(
            f"{printable(first.path)}: a GGUF file of the architecture {printable(repr(kind))}, whose names are not known; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    rows = {name: row_of(name, kind, architecture, first) for name in base.tensors}
    return base.seen_as(Named, rows=rows, held=base)


def row_of(name: str, kind: str, architecture: Architecture, file: GgufFile) -> Row:
    """What a tensor of a base is in the model."""
    found = in_model(name, architecture)
    if found.rows is None:
        return Row(found.name, shifted=found.shifted)
    queries = file.number(f"{kind}.attention.head_count", found.layer)
    keys = file.number(f"{kind}.attention.head_count_kv", found.layer) or queries
    order = order_of(found.rows, Heads(queries, keys)) if keys else RowOrder(0)  # which fits nothing
    return Row(found.name, order, found.shifted)
