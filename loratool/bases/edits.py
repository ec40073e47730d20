"""`Edit`: one update, or some rows of one, on rows of one weight."""

from __future__ import annotations

from dataclasses import dataclass, field

from loratool.algebra.updates.base import Update


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
