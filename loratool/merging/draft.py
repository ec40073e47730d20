"""What adapters do to the tensors of an output, while it is being found out: edits, new tensors, and every misfit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from loratool.adapters.adapter import Adapter, StoredTensor, same_values, unloaded
from loratool.algebra.updates.compound import images_in, with_weight
from loratool.algebra.updates.replacing import Replace, ReplaceRows
from loratool.bases.binding import Place, tell
from loratool.bases.decoded import Decoded, weight_of
from loratool.bases.edits import Edit, torn, whole_of
from loratool.bases.side_files import ConfigEdit, head_edits, tie_edits, vocabulary_edits
from loratool.bases.tied_weights import Saved, Ties, is_generative, settle
from loratool.bases.trained_view import (
    Binder,
    Trained,
    as_trained,
    is_of_tokens,
    saved_whole,
    unequal_vocabularies,
    usual_dtype,
)
from loratool.bases.weights import Filled, Plain, StoredWeight, as_weight
from loratool.errors import FitError, InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.architectures import POOLED
from loratool.merging.components import Factors
from loratool.merging.output_layout import Origin, OutputChanges
from loratool.notes import Note


def find_changes(
    draft: Draft, weights: Sequence[float], binder: Binder, new_tensors: bool, lost: Sequence[str]
) -> OutputChanges:
    """Every edit and every new tensor. All misfits are told in one `FitError`, and with them what would be `lost`."""
    for number, weight in enumerate(weights):
        draft.add(number, weight, as_trained(draft.adapters[number], draft.base, draft.ties, binder, new_tensors))
    if draft.factors.blocks is not None:
        draft.factors.blocks.check(draft.meant)
    draft.problems += [*draft.rivals(), *torn(draft.edits)]
    if lost and draft.problems == [*lost] and not draft.unsupported:
        owners = ", ".join(dict.fromkeys(adapter.name for adapter in draft.adapters))
        raise FitError(f"{owners}: some trained weights would be lost:", lost)
    if draft.unsupported or draft.problems:
        draft.refuse()
    changes = draft.changes()
    if draft.problems:
        draft.refuse()
    return changes


@dataclass
class Draft:
    """What the adapters do to the tensors of the output, while it is being found out."""

    base: Checkpoint
    adapters: Sequence[Adapter]
    ties: Ties
    notes: list[Note]
    edits: dict[str, list[Edit]] = field(default_factory=dict)  # tensor → its edits
    saved: Saved = field(default_factory=dict)  # tensor → adapter → what that adapter puts in its place to begin from
    widened: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensor → its shape, once padded with zeros
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    factors: Factors = field(default_factory=lambda: Factors({}))  # of the weight, by component and block
    meant: set[str] = field(default_factory=set)  # tensors that have an update, whatever its weight

    def add(self, number: int, weight: float, trained: Trained) -> None:
        """Note the places of one adapter's targets, and every reason why one has none."""
        adapter, bound = self.adapters[number], trained.bound
        self.notes += [note.under(adapter.name) for note in bound.notes]
        self.problems += [f"{adapter.name}: {line}" for line in tell({**bound.problems, **trained.refused})]
        for tensor, shape in trained.widened.items() if weight else ():
            if self.widened.setdefault(tensor, shape) != shape:
                self.problems.append(
                    f"{adapter.name}: {printable(tensor)}: several adapters pad it to different shapes"
                )
        for target, places in bound.places.items():
            whole = whole_of(places, self.unedited)
            for place in map(self.beside_weight, places):
                own = weight * self.factors.of(place.tensor)
                self.meant.add(place.tensor)
                if why := self.why_not(place, trained, own):
                    self.problems.append(f"{adapter.name}: {printable(target)}: {why}")
                elif own:
                    self.put(number, target, place, own, len(places) > 1, trained, whole)
        if weight not in (0.0, 1.0) and any(isinstance(u, Replace) for u in adapter.updates.values()):
            self.notes.append(
                Note(
                    "weight-ignored",
                    f"{adapter.name}: its saved modules replace the base's regardless of the weight ({weight:g})",
                )
            )

    def beside_weight(self, place: Place) -> Place:
        """The place with its update complete, where the change of a bias depends on the weight of the same layer."""
        images, name = images_in(place.update), place.tensor.removesuffix("bias") + "weight"
        info = self.base.tensors.get(name)
        if not images or info is None or info.shape[1:] != images[0].vector.shape or info.dtype not in FLOAT_NAMES:
            return place
        if not isinstance(weight_of(self.base, name), Plain):
            return place
        weight: Any = weight_of(self.base, name)
        return replace(place, update=with_weight(place.update, weight, place.first_row - place.update_row))

    def why_not(self, place: Place, trained: Trained, weight: float) -> str:
        """Empty where an update may go to its place; else the reason it may not."""
        tensor, info = printable(place.tensor), trained.base.tensors[place.tensor]
        stored: Any = place.update.value if isinstance(place.update, Replace) else None
        if isinstance(stored, StoredTensor) and {stored.info.dtype, info.dtype} - set(FLOAT_NAMES):
            same = stored.info.dtype == info.dtype and trained.base.tensors[place.tensor].shape == stored.shape
            return "" if same else f"is stored as {stored.info.dtype}, but {tensor} as {info.dtype}"
        if info.dtype not in FLOAT_NAMES:
            kind = self.base.unread.get(place.tensor) if isinstance(self.base, Decoded) else None
            found = (
                f"is packed with {kind}, which loratool does not read"
                if kind
                else (f"is stored as {info.dtype}; only {', '.join(FLOAT_NAMES)} weights can be edited")
            )
            self.unsupported.append(f"{tensor} {found}; pass the unquantised model as BASE")
        if images_in(place.update):
            return f"depends on the weight of the same layer, but the base has no matching plain weight for {tensor}"
        if weight < 0 and (place.update.replaces or place.tensor in trained.saved):
            return f"replaces the base's weight, which a weight of {weight:g} cannot undo"
        return ""

    def put(
        self,
        number: int,
        target: str,
        place: Place,
        weight: float,
        shared: bool,
        trained: Trained,
        whole: StoredWeight | None,
    ) -> None:
        """Note an update at its place, and what the weight there was when it was trained."""
        adapter, tensor = self.adapters[number], place.tensor
        if isinstance(place.update, Replace) and trained.base.tensors[tensor].dtype not in FLOAT_NAMES:
            # whole numbers, such as a count of batches: copied, for nothing is computed
            self.saved.setdefault(tensor, {})[number] = unloaded(place.update.value)
            return
        edit = Edit(
            weight=tensor,
            first_row=place.first_row,
            rows=place.rows,
            update=place.update,
            strength=weight,
            adapter=number,
            target=target,
            rule=place.rule,
            update_row=place.update_row,
            columns=place.columns,
            fold=place.fold,
            shared=shared,
            whole=whole,
        )
        if tensor in trained.saved:
            self.saved.setdefault(tensor, {})[number] = trained.saved[tensor]
            if isinstance(place.update, Replace):
                return
        elif target in adapter.bases and weight > 0 and (own := saved_whole(adapter, target)) is not None:
            shape = trained.base.tensors[tensor].shape
            if own.shape != shape:
                self.problems.append(
                    f"{adapter.name}: {printable(target)}: was trained on a saved weight of shape {list(own.shape)}, "
                    f"but {printable(tensor)} is {list(shape)}"
                )
            elif not (isinstance(before := self.unedited(tensor), Plain) and same_values(own, before)):
                self.saved.setdefault(tensor, {})[number] = own
        self.edits.setdefault(tensor, []).append(edit)

    def unedited(self, tensor: str) -> StoredWeight:
        """What the base holds of a tensor, by the name of that or of what it is tied to."""
        tied = (group.names[0] for group in self.ties.groups if tensor in group.missing)
        return weight_of(self.base, next(tied, tensor))

    def rivals(self) -> list[str]:
        """The tensors that more than one adapter replaces."""
        problems = []
        for tensor in {**self.edits, **self.saved}:
            saved = self.saved.get(tensor, {})
            owners = set(saved)
            if len(saved) > 1 and all(same_values(value, next(iter(saved.values()))) for value in saved.values()):
                owners = {min(saved)}  # trained on top of the same weight
            rows: dict[int, int] = {}
            for edit in self.edits.get(tensor, ()):
                if isinstance(edit.update, Replace):
                    owners.add(edit.adapter)
                elif isinstance(edit.update, ReplaceRows):
                    owners |= {
                        a for row in edit.update.index if (a := rows.setdefault(row, edit.adapter)) != edit.adapter
                    }
                    owners |= {edit.adapter} if owners else set()
            if len(owners) > 1:
                names = ", ".join(self.adapters[owner].name for owner in sorted(owners))
                problems.append(f"{printable(tensor)}: replaced by several adapters ({names}); only one can do so")
        return problems

    def changes(self) -> OutputChanges:
        """The edits in their order, the sources of tensors that are not the base's, and what the config must say."""
        base, tied = self.base.tensors, {name for group in self.ties.groups for name in group.missing}
        heads = {
            tensor: value
            for tensor, by in self.saved.items()
            for value in by.values()
            if tensor not in tied and (tensor not in base or not is_of_tokens(tensor, base[tensor].shape, self.ties))
        }
        config: list[ConfigEdit] = []
        for adapter in self.adapters:
            own = {
                tensor: value.shape
                for tensor, value in heads.items()
                if any(value.file is file for file in adapter.file.files)
            }
            config += head_edits(self.base, adapter.training, own, {tensor for tensor in own if tensor not in base})
        classes = [edit.value[0] for edit in config if edit.path == ("architectures",)]
        pooled = any("pooler." in name for name in (*base, *heads))
        if self.base.model_type in POOLED and not pooled and any("SequenceClassification" in name for name in classes):
            self.notes.append(
                Note(
                    "pooler-missing",
                    f"a {classes[0]} has a pooler, which neither the base nor the adapter contains; it is initialised "
                    "at random when the output is loaded, as it was when the adapter was trained",
                )
            )
        settled = settle(self.ties, self.edits, self.saved, len(self.adapters), not classes or is_generative(classes))
        self.problems += settled.problems
        first = {tensor: next(iter(by.values())) for tensor, by in self.saved.items()}
        grown = {t: v.shape for t, v in first.items() if t not in heads and self.unedited(t).shape != v.shape}
        self.problems += unequal_vocabularies(self.ties, grown)
        config += vocabulary_edits(self.base.config, {shape[0] for shape in grown.values()})
        config += tie_edits(self.base.config) if settled.untied else []
        moved: dict[str, Origin] = {}
        added: list[Origin] = []
        for name, of in settled.kept:
            text = f"{printable(name)}: stays tied to {printable(of)}, because both change in the same way"
            self.notes.append(Note("tied-weight-kept", text))
        for name, of in settled.added:
            begins = as_weight(first[name]) if name in first else weight_of(self.base, of)
            added.append(Origin(begins, name, base[of].dtype))
            text = f"{printable(name)}: written as a separate tensor; the base ties it to {printable(of)}"
            self.notes.append(Note("tied-weight-split", text))
        moved |= self.filled_up(first)
        for tensor, value in first.items():
            what = f"{printable(tensor)}: {list(value.shape)} as the adapter saved it"
            if tensor in base:
                moved[tensor] = Origin(as_weight(value), tensor, base[tensor].dtype)
                if base[tensor].dtype in FLOAT_NAMES:
                    text = f"{what}, replacing the base's {list(base[tensor].shape)}"
                    self.notes.append(Note("tensor-replaced", text))
            elif tensor not in tied:
                added.append(Origin(as_weight(value), tensor, usual_dtype(base)))
                self.notes.append(Note("tensor-added", f"{what}, which the base lacks"))
        # what replaces a weight comes first, then what replaces rows of it, then what changes it
        edits = {
            tensor: tuple(sorted(found, key=lambda e: (not isinstance(e.update, Replace), not e.update.replaces)))
            for tensor, found in self.edits.items()
        }
        return OutputChanges(edits, moved, added, config)

    def filled_up(self, saved: Mapping[str, StoredTensor]) -> dict[str, Origin]:
        """The tensors that begin as the base's with zeros around them, unless others see them as they were."""
        found: dict[str, Origin] = {}
        for tensor, shape in self.widened.items():
            info = self.base.tensors[tensor]
            if any(e.update.shape[1:] != shape[1:] for e in self.edits.get(tensor, ())) or tensor in saved:
                self.problems.append(f"{printable(tensor)}: one adapter fills it up to {list(shape)}, others do not")
            found[tensor] = Origin(Filled(self.unedited(tensor), shape), tensor, info.dtype)
            text = f"{printable(tensor)}: padded with zeros from {list(info.shape)} to {list(shape)}, as it was trained"
            self.notes.append(Note("tensor-widened", text))
        return found

    def refuse(self) -> NoReturn:
        """Tell all misfits of all adapters in one error."""
        owners = ", ".join(dict.fromkeys(a.name for a in self.adapters))
        if self.unsupported:
            raise InputError(
                "the base stores weights in a form that cannot be edited:", dict.fromkeys(self.unsupported)
            )
        raise FitError(f"{owners} does not fit the base '{self.base.name}':", self.problems)
