"""The edits of one weight, with their factors in memory, and what they make of some of its rows.

Sums of products come out exactly (`exact_rows`); every other update is its formula in float64, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

from loratool.adapters.adapter import Derived, fields_of, load_rows, load_update, stored_tensors
from loratool.algebra.rounding import bits_of, round_once
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.replacing import Replace
from loratool.bases.edits import Edit
from loratool.bases.weights import Room
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.files.stopwatch import lap
from loratool.lazy import NDArray, torch
from loratool.merging.addends import Addend, modules_in
from loratool.merging.compensated_sums import compensated_sum
from loratool.merging.exact_rows import ExactSum, Scratch, convert, largest_of
from loratool.merging.gain import measure_kept, rows_apart
from loratool.merging.output_layout import Span
from loratool.merging.resources import sums_products
from loratool.merging.shared_updates import SharedUpdates
from loratool.merging.stochastic import random_numbers, round_at_random
from loratool.merging.totals import BlockSeen, Effect

LOOKED_AT = 1 << 19  # elements in which the effect of an update is looked for at a time
LOOKED_AT_FIRST = 1 << 14  # elements in which it is looked for at first; most show it there
AT_RANDOM = 1 << 18  # elements that are rounded at random at a time
READ_AT_ONCE = 16 << 20  # bytes of a weight that is looked at before it is edited


@dataclass(frozen=True)
class LoadedEdit:
    """An edit with its factors in memory, or a replacement whose rows are read as they are needed."""

    edit: Edit
    update: Update
    strength: float

    @property
    def effect(self) -> Effect:
        return self.edit.adapter, self.edit.target

    def apply(self, block: torch.Tensor, first_row: int, base: torch.Tensor) -> None:
        """Change what this edit covers of `block`, which begins at `first_row` of the weight."""
        start = max(first_row, self.edit.first_row)
        stop = min(first_row + block.shape[0], self.edit.first_row + self.edit.rows)
        if start >= stop:
            return
        rows = block[start - first_row : stop - first_row, self.edit.columns]
        unmerged = base[start - first_row : stop - first_row, self.edit.columns]
        own = start - self.edit.first_row + self.edit.update_row
        if isinstance(self.update, Replace):
            load_rows(self.update, own, stop - start, block.device, block.dtype).add_rows(rows, 0, 1.0, unmerged)
        else:
            self.update.add_rows(rows, own, self.strength, unmerged)


@dataclass(frozen=True)
class LoadedEdits:
    """All edits of one span on one device."""

    replacements: tuple[LoadedEdit, ...]  # they come first
    others: tuple[LoadedEdit, ...]
    rows: int  # of the weight
    width: int
    target: torch.dtype
    exact: torch.dtype  # holds every element of the weight, and of what replaces it, as it is
    norm: float  # ‖ΔW‖ of all but replacements; no element changes by more; infinite where that depends on the weight
    name: str  # of the tensor in the output
    rounding: str = "nearest"
    read: Callable[[Room, NDArray[Any], int], None] | None = None  # `read_rows` of the weight

    @cached_property
    def rounded(self) -> ExactSum | None:
        """What is added and rounded to the nearest: `sum`, or what makes up for what rounding takes from it."""
        if self.sum is None or self.rounding != "compensated" or self.read is None or self.target.itemsize != 2:
            return self.sum
        with OpenSources() as sources:
            return compensated_sum(self.sum, partial(self.read, Room(sources)))

    @cached_property
    def sum(self) -> ExactSum | None:
        """The edits that are no replacements, where all of them are sums of products."""
        if not all(each.update.adds_products for each in self.others):
            return None
        return ExactSum(
            (part for each in self.others for part in addends_of_edit(each, self.width)),
            self.width,
            self.target,
            self.exact,
            self.rows,
        )

    @property
    def is_bound(self) -> bool:
        """Whether `norm` is no more than a bound of ‖ΔW‖ here: of several edits, or of one that goes on elsewhere."""
        return not math.isfinite(self.norm) or len(self.others) != 1 or self.others[0].edit.shared

    def only(self, effect: Effect) -> LoadedEdits:
        """The edits of one update."""
        chosen = [tuple(e for e in edits if e.effect == effect) for edits in (self.replacements, self.others)]
        return replace(self, replacements=chosen[0], others=chosen[1], rounding="nearest")

    def merge(
        self, before: torch.Tensor, first: int, after: torch.Tensor, scratch: Scratch, measure: bool
    ) -> BlockSeen:
        """Put rows from `first` on, with all edits, into `after`; `before` has them as they are stored.

        ‖ΔW‖ is seen where `measure` asks for it, and nothing replaces W.
        """
        seen, known = BlockSeen(), not (self.is_bound or self.replacements)
        measured = measure and not (known or self.replacements)
        if not self.replacements and not self.others:
            seen.largest = largest_of(before)
            after.copy_(convert(before, after.dtype, math.isfinite(seen.largest)))
        elif self.sum is None:
            self.merge_formulas(before, first, after, seen)
        else:
            tile = max(1, scratch.elements // self.width)
            substitute = self.substitute if self.replacements else None
            total = self.rounded or self.sum
            seen = total.merge(before, first, after, scratch, tile, substitute, measured)
            if self.at_random:
                self.round_sums(self.sum, before, first, after)
            rows = self.sampled(first, len(before))
            if rows and not self.replacements:
                some = slice(rows[0] - first, None, self.every)
                seen.kept = self.kept(self.sum, before[some], after[some], rows)
                lap("gain")
        if known:
            seen.change = self.norm**2 * len(before) / self.rows
        return seen

    @property
    def at_random(self) -> bool:
        return self.rounding == "stochastic" and self.target.itemsize == 2

    def round_sums(self, total: ExactSum, before: torch.Tensor, first: int, after: torch.Tensor) -> None:
        """Round the exact sums of some rows at random, in place of `after`; what is not finite stays as it is."""
        singles = total.singles
        step = max(1, AT_RANDOM // self.width)
        for at in range(0, before.shape[0], step):
            weight = before[at : at + step].double()
            self.substitute(weight, first + at)
            finite = weight.isfinite()
            weight.masked_fill_(~finite, 0)
            values, errors = total.wide.sums(weight, first + at)
            start, flat = (first + at) * self.width, weight.flatten()
            numbers = random_numbers(self.name, start, flat.numel())

            def exact(place: int, start: int = start, flat: torch.Tensor = flat) -> Fraction:
                return singles.value(start + place, float(flat[place]))

            rounded = round_at_random(values.flatten(), errors.flatten(), numbers, after.dtype, exact).view_as(weight)
            part = after[at : at + step]
            part.copy_(torch.where(finite & ((rounded != 0) | (part != 0)), rounded, part))  # zeros keep their signs

    @property
    def every(self) -> int:
        """Of so many rows one is looked at for what rounding leaves of the update."""
        return rows_apart(self.rows, self.width)

    def sampled(self, first: int, count: int) -> range:
        """The numbers of such rows among `count` of them from row `first` on."""
        return range(first + -first % self.every, first + count, self.every)

    def kept(
        self, total: ExactSum, before: torch.Tensor, after: torch.Tensor, rows: range
    ) -> dict[str, tuple[float, float]]:
        """What rounding leaves of the update in sampled rows, as `measure_kept` tells it."""
        product = total.only_product(rows[0], rows[-1] + 1 - rows[0])
        if product is not None and product.down is not None:
            from loratool.merging.kernels import compiled, kept_in_rows

            own = slice(rows[0] - product.place.first, rows[-1] + 1 - product.place.first, rows.step)
            kept, squared = compiled(kept_in_rows)(before, after, (product.up[own], product.down), product.scale)
            finite = math.isfinite(kept) and math.isfinite(squared)
            return {product.module: (kept * self.every, squared * self.every)} if finite else {}
        numbers, modules = numbers_in(rows, before.device), [(stack.module, stack.place) for stack in total.stacks]
        return measure_kept(before, total.change_of(numbers), after, numbers, modules, self.every)

    def substitute(self, rows: torch.Tensor, first: int) -> None:
        """Put what replaces some rows of the weight, from row `first` on, in their place."""
        for each in self.replacements:
            each.apply(rows, first, rows)

    def merge_formulas(self, before: torch.Tensor, first: int, after: torch.Tensor, seen: BlockSeen) -> None:
        """The same in float64, step by step; rounded once in the end."""
        block = before.double()
        seen.weight = float(torch.linalg.vector_norm(block)) ** 2
        self.substitute(block, first)
        base = block.clone()
        for each in self.others:
            each.apply(block, first, base)
        after.copy_(convert(block, after.dtype, math.isfinite(largest_of(block))))
        if self.at_random:
            halves, finite = random_numbers(self.name, first * self.width, block.numel()), block.isfinite()
            flat = block.masked_fill(~finite, 0).flatten()
            rounded = round_at_random(flat, flat * 0, halves, after.dtype, lambda at: Fraction(float(flat[at])))
            after.copy_(torch.where(finite, rounded.view_as(after), after))
        seen.change = float(torch.linalg.vector_norm(block.sub_(base))) ** 2
        rows = self.sampled(first, len(before))
        if rows and not self.replacements:
            modules = modules_in((each.edit for each in self.others), self.width)
            some, numbers = slice(rows[0] - first, None, self.every), numbers_in(rows, block.device)
            seen.kept = measure_kept(before[some], block[some], after[some], numbers, modules, self.every)
        seen.largest = math.inf  # nobody looked


def numbers_in(rows: range, device: torch.device) -> torch.Tensor:
    """(n,) of them on a device."""
    return torch.arange(rows.start, rows.stop, rows.step, device=device)


def load_edits(span: Span, shared: SharedUpdates, device: torch.device) -> LoadedEdits:
    """Read the factors."""
    replacements, others = [], []
    exact = torch.float64 if span.weight.exact == "F64" else torch.float32
    for edit in span.edits:
        if edit.update.replaces:
            exact = held_in(edit.update, exact)
            replacements.append(loaded_replacement(edit, device, held_in(edit.update, torch.float32)))
            continue
        dtype = held_in(edit.update, torch.float32) if sums_products(span) else torch.float64
        update = shared.load(edit, device, dtype)
        if update.needs_weight:
            update = update.prepared(partial(weight_rows, span, edit, device, dtype))
        others.append(LoadedEdit(edit, update, edit.strength))
    loaded = LoadedEdits(
        tuple(replacements),
        tuple(others),
        span.rows,
        span.width,
        target=getattr(torch, FLOAT_NAMES[span.computed]),
        exact=exact,
        norm=sum(each.update.norm() * abs(each.strength) for each in others),
        name=span.placed.name,
        rounding=span.rounding,
        read=partial(read_rows, span, tuple(replacements)),
    )
    _ = loaded.rounded  # before several workers ask for it at the same time
    if device.type == "cuda":  # the factors must be complete for the streams of other workers too
        torch.cuda.current_stream(device).synchronize()
    return loaded


def loaded_replacement(edit: Edit, device: torch.device, dtype: torch.dtype) -> LoadedEdit:
    """An edit that replaces rows; what replaces all of a weight stays on disk."""
    update = edit.update
    return LoadedEdit(edit, update if isinstance(update, Replace) else load_update(update, device, dtype), 1.0)


def read_rows(span: Span, replacements: Sequence[LoadedEdit], room: Room, values: NDArray[Any], first: int) -> None:
    """Put rows of a weight, from row `first` on, with what replaces some of them, into (n, width) of float32."""
    stored, rows = getattr(torch, FLOAT_NAMES[span.weight.exact]), torch.from_numpy(values)
    rows.copy_(span.matrix.rows(first, len(values), rows.device, stored, room))
    for each in replacements:
        each.apply(rows, first, rows)


def held_in(update: Update, least: torch.dtype) -> torch.dtype:
    """Float32, or float64 where `least` is it or float32 does not hold all that the update has stored."""
    computed = any(isinstance(value, Derived) for value in fields_of(update).values())
    wide = computed or any(tensor.info.dtype == "F64" for tensor in stored_tensors(update))
    return torch.float64 if wide else least


def addends_of_edit(loaded: LoadedEdit, width: int) -> Iterator[Addend]:
    """What an edit adds, product by product."""
    edit = loaded.edit
    for product in loaded.update.products(len(range(*edit.columns.indices(width)))):
        part = Addend.of(product, edit.first_row, edit.update_row, edit.rows, edit.columns, loaded.strength)
        if part is not None:
            yield replace(part, module=edit.target)


def has_effect(edits: LoadedEdits, block: torch.Tensor, first: int) -> bool:
    """Whether some edits by themselves give any element of a block another value, after rounding.

    `block` holds rows from `first` on as they are stored. More of it is looked at only as long as nothing changes.
    """
    for rows in looked_at(block):
        before = block[rows]
        after = torch.empty(before.shape, dtype=edits.target, device=block.device)
        edits.merge(before, first + rows.start, after, Scratch(block.device, before.numel(), 8), measure=False)
        if not same_bits(round_once(before, edits.target), after):
            return True
    return False


def is_changed(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a block, (n, width), has become another one, after rounding."""
    return any(not same_bits(round_once(before[rows], after.dtype), after[rows]) for rows in looked_at(before))


def looked_at(block: torch.Tensor) -> Iterator[slice]:
    """Rows to look at in turn, few of them at first."""
    at, width = 0, max(1, block.shape[1])
    count = max(1, LOOKED_AT_FIRST // width)
    while at < block.shape[0]:
        yield slice(at, at + count)
        at, count = at + count, min(4 * count, max(1, LOOKED_AT // width))


def weight_rows(
    span: Span, edit: Edit, device: torch.device, dtype: torch.dtype, first: int = 0, count: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Some of the rows of an edit's update, by default all that the edit covers, as no update but a replacement has left them.

    Of an update that covers rows of several weights, those of all of them.
    """
    if edit.whole is not None:
        weight, before, shift, columns = edit.whole, [], 0, slice(None)
        own = range(edit.whole.shape[0])
    else:
        weight, shift, columns = span.matrix, edit.first_row - edit.update_row, edit.columns
        before = [each for each in span.edits if each.update.replaces]
        own = range(edit.update_row, edit.update_row + edit.rows)
    if count is not None:
        own = range(first, first + count)
    replacements = [loaded_replacement(each, device, dtype) for each in before]
    stored = getattr(torch, FLOAT_NAMES[weight.exact])
    step = max(1, READ_AT_ONCE // (span.width * stored.itemsize))
    with OpenSources() as sources:
        for at in range(own.start, own.stop, step):
            block = weight.rows(at + shift, min(step, own.stop - at), device, stored, Room(sources)).to(dtype)
            for replacement in replacements:
                replacement.apply(block, at + shift, block)
            yield at, block[:, columns]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, −0 and +0 being two; a NaN is a NaN."""
    unequal = bits_of(one.contiguous()) != bits_of(other.contiguous())
    return not bool((unequal & ~(one.isnan() & other.isnan())).any())
