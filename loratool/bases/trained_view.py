"""The base as the trained model saw it: tied heads have a name, a grown vocabulary its rows, a new head its place.

Targets are bound against that view. What an adapter saved whole in another shape than the base's, or for a module
that the base has not, becomes the source of the output's tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from loratool.adapters.adapter import Adapter, Flattened, StoredTensor
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.bases.binding import Bound, Place
from loratool.bases.tied_weights import Ties
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS

Shape = tuple[int, ...]
Binder = Callable[["Adapter", Checkpoint], Bound]
NEW_TENSORS = "--allow-new-tensors"
RESIZED = (
    "pass the trained model with its resized vocabulary as BASE; to save it, run "
    "model.unload().save_pretrained(FOLDER) in the training script"
)


@dataclass(frozen=True)
class View(Checkpoint):
    """A base with tensors that no file of it holds, or holds in another shape."""

    held: Mapping[str, TensorInfo] = field(default_factory=dict)  # the tensors that it has
    assumed: Mapping[str, Shape] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        dtype = usual_dtype(self.held)
        return {
            **self.held,
            **{
                name: TensorInfo(name, self.held[name].dtype if name in self.held else dtype, shape, 0, 0)
                for name, shape in self.assumed.items()
            },
        }


@dataclass(frozen=True)
class AnySize(Replace):
    """Something of a shape that takes the place of a tensor of any size: for asking which one is meant."""

    value: Shaped  # type: ignore[assignment]  # never loaded

    def fit(self, shape: Shape) -> Update | None:
        return self if len(shape) == len(self.shape) else None


class Shaped(NamedTuple):
    """A shape, to ask with."""

    shape: Shape


@dataclass(frozen=True)
class Trained:
    """The model that an adapter was trained on, and what its targets are there."""

    base: Checkpoint
    bound: Bound
    # tensor → what takes its place, being new or of another shape
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # target → why it may take nobody's place
    widened: Mapping[str, Shape] = field(default_factory=dict)  # tensor → the shape it is filled up to with zeros


def usual_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most float tensors have."""
    counts = Counter(info.dtype for info in tensors.values() if info.dtype in FLOAT_NAMES)
    return counts.most_common(1)[0][0] if counts else "F32"


def as_trained(adapter: Adapter, base: Checkpoint, ties: Ties, binder: Binder, new_tensors: bool) -> Trained:
    """Bind an adapter's targets in the model that was trained.

    Args:
        adapter: whose targets are looked for.
        base: the model as it is on disk.
        ties: what it ties.
        binder: finds the places of targets.
        new_tensors: whether the adapter may bring modules that the base has not.
    """
    heads = {name: base.tensors[group.names[0]].shape for group in ties.groups for name in group.missing}

    def bound_in(shapes: Mapping[str, Shape]) -> tuple[Checkpoint, Bound]:
        assumed = {**heads, **shapes}
        seen = base.seen_as(View, held=base.tensors, assumed=assumed) if assumed else base
        return seen, without_rows(adapter, binder(adapter, seen), seen, ties, binder)

    seen, bound = bound_in({})
    if widened := widened_by(adapter, bound, seen, binder):
        seen, bound = bound_in(widened)
    whole = {target: value for target in bound.problems if (value := saved_whole(adapter, target)) is not None}
    if not whole:
        return Trained(seen, bound, widened=widened)
    meant = meant_by(adapter, {target: value.shape for target, value in whole.items()}, seen, binder)
    saved: dict[str, StoredTensor] = {}
    refused: dict[str, str] = {}
    trained_parts = {t.partition(".")[0] for t, u in adapter.updates.items() if not isinstance(u, Replace)}
    for target, value in whole.items():
        match meant.get(target, ()):
            case (place,):
                name = place.tensor
                reason = why_not_this_size(name, value.shape, seen.tensors[name].shape, ties, new_tensors)
            case () if target in bound.proposed:  # it is there under another name
                continue
            case () if isinstance(target, Flattened):  # it names nothing new
                continue
            case () if target in adapter.updates and target.partition(".")[0] not in trained_parts:
                name = target
                reason = (
                    "" if new_tensors else f"the base has no such weight; pass {NEW_TENSORS} to add it to the output"
                )
            case _:  # inside the body of the model a name is wrong, as binding has said
                continue
        if reason:
            refused[target] = reason
        else:
            saved[name] = value
    shapes = {**widened, **{name: value.shape for name, value in saved.items()}}
    for group in ties.groups:  # what is tied to a grown tensor has grown with it
        if found := [shapes[name] for name in group.names if name in shapes]:
            for name in ties.together(group):
                shapes.setdefault(name, found[0])
    return Trained(*bound_in(shapes), saved, refused, widened)


def meant_by(
    adapter: Adapter, shapes: Mapping[str, Shape], seen: Checkpoint, binder: Binder
) -> Mapping[str, tuple[Place, ...]]:
    """The places that some targets would have if updates of these shapes fitted tensors of any size."""
    loose = {target: AnySize(Shaped(shape)) for target, shape in shapes.items()}
    return binder(replace(adapter, updates={**adapter.updates, **loose}, bases={}), seen).places


def widened_by(adapter: Adapter, bound: Bound, seen: Checkpoint, binder: Binder) -> dict[str, Shape]:
    """The tensors that an adapter fills up with zeros before it changes them, with their new shapes.

    A ControlNet's LoRA of Flux trains an input layer for twice the channels that the base has.
    """
    wide = {
        target: update.shape
        for target in bound.problems
        if isinstance(update := adapter.updates.get(target), LowRank) and update.widens
    }
    if not wide:
        return {}
    meant = meant_by(adapter, wide, seen, binder)
    return {
        place.tensor: shape
        for target, shape in wide.items()
        for place in meant.get(target, ())
        if all(before <= after for before, after in zip(seen.tensors[place.tensor].shape, shape, strict=True))
    }


def without_rows(adapter: Adapter, bound: Bound, seen: Checkpoint, ties: Ties, binder: Binder) -> Bound:
    """The same, with the way out of updates of a vocabulary of another size whose rows the adapter does not hold."""
    odd = {
        target: rows
        for target in bound.problems
        if saved_whole(adapter, target) is None and (rows := tokens_of(adapter.updates[target]))
    }
    if not odd:
        return bound
    meant = meant_by(adapter, {target: (rows, 1) for target, rows in odd.items()}, seen, binder)
    problems = dict(bound.problems)
    for target, rows in odd.items():
        for place in meant.get(target, ())[:1]:
            before, update = seen.tensors[place.tensor].shape, adapter.updates[target]
            grown = rows > before[0] if isinstance(update, ReplaceRows) else rows != before[0]
            if grown and update.shape[1:] == before[1:] and is_of_tokens(place.tensor, before, ties):
                problems[target] = (
                    f"was trained with at least {rows} tokens, but {printable(place.tensor)} has {before[0]} and the "
                    f"adapter does not contain the other rows; {RESIZED}"
                )
    return replace(bound, problems=problems)


def tokens_of(update: Update) -> int:
    """How many tokens an update of a matrix asks for, if it is one of an embedding or of a head; 0 for others."""
    if isinstance(update, ReplaceRows):
        return max(update.index, default=-1) + 1
    return update.shape[0] if len(update.shape) == 2 and update.shape[0] > 0 else 0


def saved_whole(adapter: Adapter, target: str) -> StoredTensor | None:
    """What an adapter holds of a weight in full: as its replacement, or as what its update was trained on top of."""
    update = adapter.bases.get(target) or adapter.updates[target]
    value: object = update.value if isinstance(update, Replace) else None
    return value if isinstance(value, StoredTensor) else None


def why_not_this_size(tensor: str, shape: Shape, before: Shape, ties: Ties, allowed: bool) -> str:
    """Empty where a saved tensor may take the place of one of another shape; else the reason it may not."""
    sizes = f"the adapter's is {list(shape)}, but {printable(tensor)} is {list(before)}"
    if len(shape) != len(before) or shape[1:] != before[1:]:
        return sizes
    if allowed or is_of_tokens(tensor, before, ties):
        return ""
    return f"{sizes}: the numbers of labels differ; pass {NEW_TENSORS} to use the adapter's and update config.json"


def is_of_tokens(tensor: str, shape: Shape, ties: Ties) -> bool:
    """Whether a tensor has a row for each token."""
    module, _, parameter = tensor.rpartition(".")
    if parameter == "bias":
        return any(shape == ties.base.tensors[group.names[0]].shape[:1] for group in ties.groups)
    known = {name for group in ties.groups for name in group.names}
    return tensor in known or module.rpartition(".")[2] in INPUT_EMBEDDINGS | OUTPUT_HEADS


def unequal_vocabularies(ties: Ties, shapes: Mapping[str, Shape]) -> list[str]:
    """What was left behind when a vocabulary grew; `shapes` are those of the tensors that grew."""
    base, problems = ties.base.tensors, list[str]()
    for group in ties.groups:
        before = base[group.names[0]].shape[0]
        grown = [name for name in group.names if name in shapes]
        if not grown or group.one_role:
            continue
        modules = {name.rpartition(".")[0] for name in group.names}
        biases = [
            name
            for name, info in base.items()
            if (info.elements == before and (name.rpartition(".")[0] in modules or name.endswith("final_logits_bias")))
            or any(other.one_role and name == other.names[0] for other in ties.groups)
        ]
        rows = shapes[grown[0]][0]
        for name in (*group.names, *biases):
            now = shapes[name][0] if name in shapes else before
            if now != rows and name in base and before in base[name].shape:  # what is tied has grown along
                problems.append(
                    f"{printable(grown[0])} has {rows} tokens in the adapter, but {printable(name)} has {now} in the "
                    f"base and the adapter does not contain its rows; {RESIZED}"
                )
    return problems
