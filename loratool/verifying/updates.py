"""What each module adds to some rows of a weight, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from loratool.adapters.adapter import fields_of, load_update
from loratool.algebra.rounding import round_once
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update, Wrapped
from loratool.algebra.updates.experts import ExpertLowRank
from loratool.algebra.updates.replacing import Replace
from loratool.algebra.updates.residual import Residual
from loratool.bases.edits import Edit
from loratool.lazy import Tensor, torch
from loratool.merging.output_layout import Span

if TYPE_CHECKING:
    from loratool.merging.loaded_edits import LoadedEdit

MOST_MODULES = 16  # of a weight that are told apart; a stack of experts has hundreds
Module = tuple[int, str]  # the adapter's number and the target, which is empty where its modules are not told apart


def modules_of(edits: Sequence[Edit]) -> list[Module]:
    """The modules that change a weight; each adapter as a whole where they are many."""
    every = dict.fromkeys((e.adapter, e.target) for e in edits if not e.update.replaces)
    return [*every] if len(every) <= MOST_MODULES else [(adapter, "") for adapter in dict.fromkeys(a for a, _ in every)]


class Updates:
    """The edits of a span, or others in their place, loaded in float64 on a device."""

    def __init__(
        self, span: Span, device: torch.device, edits: Sequence[Edit] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is one to which factors are rounded first."""
        from loratool.merging.loaded_edits import LoadedEdit, weight_rows  # with all that torch computes

        self.replacements: list[LoadedEdit] = []
        self.others: list[LoadedEdit] = []
        wide = torch.float64
        edits = span.edits if edits is None else edits
        self.modules = modules_of(edits)
        loaded: dict[int, Update] = {}  # several edits may take rows of one update
        for edit in edits:
            if id(edit.update) not in loaded:
                whole = isinstance(edit.update, Replace)
                loaded[id(edit.update)] = edit.update if whole else in_dtype(edit.update, device, dtype)
            update = loaded[id(edit.update)]
            if edit.update.replaces:
                self.replacements.append(LoadedEdit(edit, update, 1.0))
                continue
            if update.needs_weight:
                update = update.prepared(partial(weight_rows, span, edit, device, wide))
            self.others.append(LoadedEdit(edit, update, edit.strength))

    @property
    def scales(self) -> list[float]:
        """The scaling of each module's update; 0 where it has none, or several."""
        found: dict[Module, set[float]] = {module: set() for module in self.modules}
        for each in self.others:
            scaled = scaling_of(each.update)
            found[each.effect if each.effect in found else (each.edit.adapter, "")].add(scaled[0] if scaled else 0.0)
        return [every.pop() if len(every) == 1 else 0.0 for every in found.values()]

    def begin(self, before: Tensor, first: int) -> Tensor:
        """Rows of W in float64, (n, width), from row `first` on, with what replaces some of them in their place."""
        weight = before.to(torch.float64, copy=True)
        for each in self.replacements:
            each.apply(weight, first, weight)
        return weight

    def changes(self, weight: Tensor, first: int) -> list[Tensor]:
        """What each module adds to these rows, (n, width) each; some of it depends on what those before it have added."""
        found = {module: torch.zeros_like(weight) for module in self.modules}
        for each in self.others:
            total = found[each.effect if each.effect in found else (each.edit.adapter, "")]
            if each.update.adds_products:
                each.apply(total, first, weight)
                continue
            before = sum(found.values(), weight)
            block = before.clone()
            each.apply(block, first, weight)
            total += block - before
        return [*found.values()]


def doubt_of(span: Span) -> float:
    """How far elements of the formula may be off where a tool decomposes W in float32; 0 where none has to."""
    from loratool.merging.loaded_edits import weight_rows

    cpu, found = torch.device("cpu"), 0.0
    for edit in span.edits:
        if isinstance(edit.update, Residual):
            rows = weight_rows(span, edit, cpu, torch.float64)
            found = max(found, abs(edit.strength) * edit.update.uncertainty(torch.cat([block for _, block in rows])))
    return found


def in_dtype(update: Update, device: torch.device, dtype: torch.dtype | None) -> Update:
    """An update loaded in float64, its tensors rounded to a dtype before."""
    wide = load_update(update, device, torch.float64)
    return wide if dtype is None else rounded_factors(wide, dtype)


def rounded_factors(update: Update, dtype: torch.dtype) -> Update:
    """A loaded update with every tensor of floats rounded to a dtype."""
    found: dict[str, object] = {}
    for name, value in fields_of(update).items():
        if isinstance(value, Update):
            found[name] = rounded_factors(value, dtype)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = round_once(value, dtype).double()
    return dataclasses.replace(update, **found)  # type: ignore[type-var]


def rounded_twice(
    weight: Tensor, changes: Sequence[Tensor], target: torch.dtype, scales: Sequence[float] = ()
) -> Tensor:
    """W' of some rows where each change is rounded before it is added, and the sum again, as with 16-bit factors.

    With `scales`, each change is rounded before and after it is multiplied by its own, as PEFT does.
    """
    for number, change in enumerate(changes):
        scale = scales[number] if scales else 0.0
        scaled = round_once(change / scale, target).double() * scale if scale else change
        weight = round_once(weight + round_once(scaled, target).double(), target).double()
    return round_once(weight, target)


def scaling_of(update: Update) -> tuple[float, int] | None:
    """The scaling and the rank of a low-rank update; None for any other kind."""
    inner = update.inner if isinstance(update, Wrapped) else update
    if isinstance(inner, LowRank):
        return inner.scale, inner.rank
    if isinstance(inner, ExpertLowRank):
        rank = inner.a.shape[1] if len(inner.a.shape) == 3 else inner.a.shape[0] // inner.experts
        return inner.scale, rank
    return None
