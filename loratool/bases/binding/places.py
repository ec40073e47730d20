"""What binding comes to: the places of updates, and the reasons where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from loratool.algebra.updates.base import Update
from loratool.notes import Note

ALL = slice(None)


Step = tuple[str, str]  # of a rule: its code, and the same in words


class Rule(str):
    """How a place was found, in words: what was done to the name, and which part of the tensor is meant."""

    steps: tuple[Step, ...]

    def __new__(cls, *steps: Step) -> Rule:
        self = super().__new__(cls, ", ".join(words for _, words in steps) or "exact")
        self.steps = steps
        return self

    def then(self, code: str, words: str) -> Rule:
        """The same with one step more."""
        return Rule(*self.steps, (code, words))


@dataclass(frozen=True)
class Place:
    """Where an update, or some rows of one, goes.

    The tensor is seen as a matrix whose rows are its first `fold` dimensions together: rows `first_row` …
    `first_row + rows` of it, at `columns`, take the rows of `update` from `update_row` on.
    """

    tensor: str
    rule: Rule  # how it was found
    update: Update  # fitted to the tensor, or to the part of it
    first_row: int
    rows: int
    update_row: int = 0
    columns: slice = field(default_factory=lambda: ALL)
    fold: int = 1


@dataclass(frozen=True)
class Bound:
    """What became of an adapter's targets: each is a key of `places` or of `problems`, but for optional ones."""

    places: Mapping[str, tuple[Place, ...]]
    problems: Mapping[str, str]
    notes: tuple[Note, ...] = ()
    # those of `problems` whose weight the base has not and need not have: target → "input embedding" or "output head"
    missing: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    proposed: frozenset[str] = frozenset()  # those of `problems` that name a `--map`


@dataclass(frozen=True)
class Match:
    """A target's places with its update as it is and turned round; one of them is empty unless both fit."""

    straight: tuple[Place, ...]
    turned: tuple[Place, ...] = ()

    @property
    def open(self) -> bool:
        return bool(self.straight and self.turned)

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(place.tensor for place in self.straight or self.turned)
