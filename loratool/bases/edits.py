"""`Edit`: one update, or some rows of one, on rows of one weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loratool.algebra.updates.base import Update
from loratool.bases.binding.places import Place
from loratool.bases.weights import Slice, Stacked, StoredWeight
from loratool.errors import printable


@dataclass(frozen=True)
class Edit:
    """One update, or some rows of one, on rows `first_row` … `first_row + rows` of one weight."""

    weight: str
    first_row: int
    rows: int
    update: Update
    strength: float
    adapter: int  # which of the merge's adapters
    target: str  # what that adapter calls the weight
    rule: str  # how its tensor was found
    update_row: int = 0  # the update's row that goes to `first_row`
    columns: slice = field(default_factory=lambda: slice(None))  # those of the weight that the update's columns go to
    fold: int = 1  # leading dimensions of the weight that make up its rows

    shared: bool = False  # other edits take other rows of the same update
    # all that the update covers, where it depends on all of it and this weight is a part
    whole: StoredWeight | None = field(default=None, compare=False)


def whole_of(places: Sequence[Place], weight_of: Callable[[str], StoredWeight]) -> StoredWeight | None:
    """What an update covers that depends on all of it, as one matrix; None where one place is all, or it depends on none."""
    if len(places) == 1 or not places[0].update.needs_weight:
        return None
    in_order = sorted(places, key=lambda place: place.update_row)
    return Stacked(tuple(rows_at(place, weight_of(place.tensor)) for place in in_order))


def rows_at(place: Place, weight: StoredWeight) -> Slice:
    """The rows and columns of a weight that are meant by a place."""
    return Slice(weight.matrix(math.prod(weight.shape[place.fold :])), place.first_row, place.rows, place.columns)


def torn(edits: Mapping[str, Sequence[Edit]]) -> Iterator[str]:
    """What is wrong with updates that depend on several weights, of which others are replaced."""
    replaced = {name for name, own in edits.items() if any(edit.update.replaces for edit in own)}
    for edit in (edit for own in edits.values() for edit in own):
        others = {tensor.info.name for tensor in edit.whole.tensors} & replaced - {edit.weight} if edit.whole else ()
        yield from (f"{printable(edit.target)}: depends on {printable(other)}, which is replaced" for other in others)
