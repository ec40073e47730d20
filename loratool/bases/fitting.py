"""An adapter held against a base: which tensor each target means, and how many parameters there are in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from loratool.adapters.formats.peft import keys
from loratool.algebra.updates import Replace
from loratool.bases.binding import bind, tell
from loratool.bases.same_base import unlike_bases
from loratool.bases.shapes import read_base
from loratool.bases.tied_weights import Ties, find_ties
from loratool.bases.trained_view import as_trained
from loratool.errors import FitError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.results.facts import BaseFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from loratool.adapters.adapter import Adapter
    from loratool.bases.binding import Place
    from loratool.bases.shapes import Base
    from loratool.notes import Note

# Saved beside the parameters of some types, and not trained.
BUFFERS = (
    *("vera_A", "vera_B", "delora_w_norm", "randlora_A", "randlora_B", "tinylora_A", "tinylora_B", "tinylora_P"),
    *("unilora_scales_A", "unilora_scales_B", *(f"glora_{part}.zeros" for part in "ABCDE")),
)
SHARED = ("vblora_vector_bank", "tinylora_v.", "unilora_theta_d")  # trained, and of no module


@dataclass(frozen=True)
class Fit:
    """What becomes of an adapter's targets in a base; without `checkpoint` only numbers are known."""

    base: BaseFacts
    adapter: str
    checkpoint: Checkpoint | None = None  # as the adapter was trained on it
    ties: Ties | None = None
    places: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def require(self) -> None:
        """Raise `FitError` naming every target that has no place."""
        if self.base.problems:
            raise FitError(f"{self.adapter} does not fit the base {self.base.path}:", self.base.problems)

    def tied(self) -> Iterator[tuple[str, ...]]:
        """The tensors of the base that are one, where the adapter changes one of them."""
        if self.ties is None:
            return
        changed = {place.tensor for places in self.places.values() for place in places}
        for group in self.ties.groups:
            if not group.one_role and changed & set(group.names) and len(names := self.ties.together(group)) > 1:
                yield names


def fit_of(
    adapter: Adapter, path: Path, weights: bool, maps: Sequence[str] = (), fan_in_fan_out: bool | None = None
) -> Fit:
    """Hold `adapter` against the base at `path`, which holds `weights` or is a config alone.

    `maps` and `fan_in_fan_out` are those of a merge.

    Raises `InputError` where the base's shapes are not known: it is quantised, or a config of an unknown family.
    """
    base = read_base(path)
    if not weights:
        trainable, more = count_parameters(adapter, set(base.weights))
        return Fit(base_facts(base, trainable, more, ()), adapter.name)
    checkpoint = open_checkpoint(path)
    ties = find_ties(checkpoint, [adapter])
    trained = as_trained(adapter, checkpoint, ties, partial(bind, maps=maps, fan_in_fan_out=fan_in_fan_out), True)
    bound = trained.bound
    problems = tuple(tell({**bound.problems, **trained.refused}))
    known = {target for target, places in bound.places.items() if any(p.tensor in base.weights for p in places)}
    trainable, more = count_parameters(adapter, known)
    facts = base_facts(base, trainable, more, problems)
    notes = (*bound.notes, *unlike_bases(checkpoint, [adapter]))
    return Fit(facts, adapter.name, trained.base, ties, bound.places, notes)


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


def count_parameters(adapter: Adapter, in_base: set[str]) -> tuple[int, int]:
    """Parameters that were trained, and those that stand beside the base's while they are.

    PEFT trains a copy of what `modules_to_save` names, beside the module itself; biases it trains in place.
    """
    trainable = more = 0
    seen: set[str] = set()  # the tensors of a module are sources of all its updates
    for target, update in adapter.updates.items():
        tensors = [
            adapter.file.tensors[name]
            for name in adapter.sources.get(target, ())
            if name not in seen and not any(f".{buffer}" in name or name.startswith(buffer) for buffer in BUFFERS)
        ]
        seen.update(adapter.sources.get(target, ()))
        size = sum(info.elements for info in tensors if info.dtype in FLOAT_NAMES)
        if not isinstance(update, Replace) or is_trained_copy(adapter, target):
            trainable += size
            more += 2 * size if isinstance(update, Replace) and target not in in_base else size
        elif target.endswith(".bias") and adapter.config.get("bias") in ("all", "lora_only"):
            trainable += size
    bank = sum(info.elements for name, info in adapter.file.tensors.items() if any(s in name for s in SHARED))
    frozen = sum(".lora_E" in name for name in seen)  # AdaLoRA keeps each module's rank as a parameter of one number
    return trainable + bank, more + bank + frozen


def is_trained_copy(adapter: Adapter, target: str) -> bool:
    """Whether a tensor that is saved whole is of a module that PEFT trained a copy of; the name ends in an entry."""
    if adapter.config.get("peft_type") == "LN_TUNING":
        return True
    saved = adapter.config.get("modules_to_save")
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    names += keys.HEADS.get(str(adapter.config.get("task_type")), ())
    module = target.rpartition(".")[0]
    parts = module.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]  # a module that is saved may hold others
    return any(path.endswith(name) for path in paths for name in names)
