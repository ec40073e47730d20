"""An adapter held against a base: which tensor each target means, and how many parameters there are in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats import format_of
from loratool.adapters.unsettled import settled
from loratool.bases.binding import Place, bind, tell
from loratool.bases.codecs import decoded
from loratool.bases.same_base import unlike_bases
from loratool.bases.shapes import Base, read_base
from loratool.bases.tied_weights import Ties, find_ties
from loratool.bases.trained_view import as_trained
from loratool.errors import FitError
from loratool.files.checkpoint import Checkpoint
from loratool.notes import Note
from loratool.results.facts import BaseFacts


@dataclass(frozen=True)
class Fit:
    """What becomes of an adapter's targets in a base; without `checkpoint` only numbers are known."""

    base: BaseFacts
    adapter: str
    checkpoint: Checkpoint | None = None  # with its packed weights decoded
    ties: Ties | None = None
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def require(self) -> None:
        """Raise `FitError` naming every target that has no place."""
        if self.base.problems:
            raise FitError(f"{self.adapter} does not fit the base '{self.base.path}':", self.base.problems)

    def tied(self) -> Iterator[tuple[str, ...]]:
        """The tensors of the base that are one, where the adapter changes one of them."""
        if self.ties is None:
            return
        changed = {place.tensor for places in self.places.values() for place in places}
        for group in self.ties.groups:
            if not group.one_role and changed & set(group.names) and len(names := self.ties.together(group)) > 1:
                yield names


def fit_of(
    adapter: Adapter,
    path: Path,
    checkpoint: Checkpoint | None,
    maps: Sequence[str] = (),
    fan_in_fan_out: bool | None = None,
) -> Fit:
    """Hold `adapter` against the base at `path`: its `checkpoint`, or None where it is a config alone.

    `maps` and `fan_in_fan_out` are those of a merge.

    Raises `InputError` where the base's shapes are not known: it is quantised in a way that is not read, or a config of
    an unknown family.
    """
    checkpoint = decoded(checkpoint) if checkpoint is not None else None
    base = read_base(path, checkpoint)
    if checkpoint is None:
        trainable, more = format_of(adapter).parameters(adapter, set(base.weights))
        return Fit(base_facts(base, trainable, more, ()), adapter.name)
    adapter = settled(adapter, checkpoint.config)
    ties = find_ties(checkpoint, [adapter])
    trained = as_trained(adapter, checkpoint, ties, partial(bind, maps=maps, fan_in_fan_out=fan_in_fan_out), True)
    bound = trained.bound
    problems = tuple(tell({**bound.problems, **trained.refused}))
    known = {target for target, places in bound.places.items() if any(p.tensor in base.weights for p in places)}
    trainable, more = format_of(adapter).parameters(adapter, known)
    facts = base_facts(base, trainable, more, problems)
    notes = (*bound.notes, *unlike_bases(checkpoint, [adapter]))
    return Fit(facts, adapter.name, checkpoint, ties, bound.places, notes)


def base_facts(base: Base, trainable: int, more: int, problems: tuple[str, ...]) -> BaseFacts:
    everything = base.parameters + more
    percent = 100 * trainable / everything if everything else 0.0
    return BaseFacts(
        path=base.path,
        architecture=base.architecture,
        source=base.source,
        parameters=base.parameters,
        trainable=trainable,
        all_parameters=everything,
        percent=percent,
        line=f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {percent:.4f}",
        problems=problems,
    )
