"""What a tool may have taken an update for: other edits of the same tensor, each with a code and words for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from loratool.adapters.model_settings import setting
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update, Wrapped
from loratool.algebra.updates.experts import ExpertLowRank
from loratool.algebra.updates.residual import Residual
from loratool.bases.edits import Edit
from loratool.grouping import by_key
from loratool.layouts.fusions import FUSIONS, HEADS, KEY_HEADS
from loratool.merging.output_layout import Span
from loratool.merging.plan import Plan

MOST_PARTS = 4  # of a fused tensor whose orders are tried
MOST_SLICES = 8  # of an update that are tried in place of a tensor's own, the nearest ones: experts may be hundreds
TRANSPOSED, EXPERT_MAJOR, FUSED_ORDER = "transposed", "expert-major", "fused-order"
NOT_TAKEN, NOT_ADDED = "part-not-subtracted", "left-out"


@dataclass(frozen=True)
class Guess:
    """Edits that a tool may have made in place of those of the plan."""

    code: str
    words: str  # what was done, as the end of a sentence
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that belong together: those of one part of a fused one, or of none."""

    count: int
    edits: tuple[Edit, ...]  # with rows counted from the first of these


def guesses(span: Span, plan: Plan) -> Iterator[Guess]:
    """Every guess for one tensor."""
    if turned := all_turned(span.edits, transposed):
        yield Guess(TRANSPOSED, "the update was added transposed", turned)
    if trained := all_turned(span.edits, trained_alone):
        words = (
            "the trained update was added, but the initialisation's part was not subtracted from the base; that is right "
            "if BASE is the residual model, for which init_lora_weights has to be true in adapter_config.json"
        )
        yield Guess(NOT_TAKEN, words, trained)
    if taken := all_turned(span.edits, part_alone):
        words = "the initialisation's part was subtracted from the base, but no trained update was added"
        yield Guess(NOT_ADDED, words, taken)
    if regrouped := all_turned(span.edits, regrouped_experts):
        yield Guess(EXPERT_MAJOR, "columns of lora_B were read in the other order of ranks and experts", regrouped)
    whole = any(
        edit.update.needs_weight for edit in span.edits
    )  # such as norms of columns: no rows stand for themselves
    parts = parts_of(span)
    if 2 <= len(parts) <= MOST_PARTS:
        for order in [*permutations(range(len(parts)))][1:]:
            yield Guess(FUSED_ORDER, order_words(parts, order), placed([parts[number] for number in order]))
        heads = setting(plan.base.config, HEADS)
        if heads and not whole and all(part.edits and part.count % heads == 0 for part in parts):
            yield Guess(FUSED_ORDER, f"parts alternate, one for each of {heads} heads", in_turns(parts, heads))
    if not whole:
        yield from turned_halves(span, plan)
        yield from other_slices(span, plan)


def all_turned(edits: Sequence[Edit], turn: Callable[[Update], Update | None]) -> tuple[Edit, ...]:
    """The edits with their updates changed in one way; none where that is not possible for all of them."""
    turned = [(edit, edit.update if edit.update.replaces else turn(edit.update)) for edit in edits]
    found = tuple(dataclasses.replace(edit, update=update) for edit, update in turned if update is not None)
    return found if len(found) == len(edits) and not all(edit.update.replaces for edit in edits) else ()


def transposed(update: Update) -> Update | None:
    """The update for a square weight, the other way round."""
    if isinstance(update, Wrapped):
        inner = transposed(update.inner)
        return None if inner is None else dataclasses.replace(update, inner=inner)
    if len(set(update.shape[-2:])) != 1 or len(update.shape) not in (2, 3):
        return None
    if isinstance(update, ExpertLowRank):
        return dataclasses.replace(update, transposed=not update.transposed)
    return update.turned if isinstance(update, LowRank) else None


def trained_alone(update: Update) -> Update | None:
    """The update without what was taken from the base for it."""
    return update.inner if isinstance(update, Residual) else None


def part_alone(update: Update) -> Update | None:
    """What was taken from the base, without the update that was trained then."""
    if not isinstance(update, Residual):
        return None
    return dataclasses.replace(update, inner=dataclasses.replace(update.inner, up=update.inner.up * 0))


def regrouped_experts(update: Update) -> Update | None:
    """The same factors with the columns of B in the other order."""
    if not isinstance(update, ExpertLowRank) or len(update.b.shape) != 2 or update.experts < 2:
        return None
    return None if update.b.shape[1] == update.experts else dataclasses.replace(update, grouped=not update.grouped)


def parts_of(span: Span) -> list[Rows]:
    """The rows of a fused tensor by what edits them, in their order; one entry where it is not fused."""
    edits = sorted(span.edits, key=lambda edit: edit.first_row)
    found: list[Rows] = []
    at = 0
    for edit in edits:
        if edit.update.replaces or edit.columns != slice(None) or edit.first_row < at:
            return []
        if edit.first_row > at:
            found.append(Rows(edit.first_row - at, ()))
        found.append(Rows(edit.rows, (dataclasses.replace(edit, first_row=0),)))
        at = edit.first_row + edit.rows
    if at < span.rows:
        found.append(Rows(span.rows - at, ()))
    if len(found) > MOST_PARTS and all(part.edits for part in found):
        apart = by_key((part.edits[0].target, part) for part in found).values()
        if 2 <= len(apart) <= MOST_PARTS:  # the rows of each, which lie apart, one after the other
            return [Rows(sum(part.count for part in parts), placed(parts)) for parts in apart]
    return found


def placed(parts: Sequence[Rows]) -> tuple[Edit, ...]:
    """The edits of parts whose rows follow each other."""
    found, at = [], 0
    for part in parts:
        found += [dataclasses.replace(edit, first_row=at + edit.first_row) for edit in part.edits]
        at += part.count
    return tuple(found)


def in_turns(parts: Sequence[Rows], times: int) -> tuple[Edit, ...]:
    """The edits of parts that take turns so many times."""
    found, at = [], 0
    for turn in range(times):
        for part in parts:
            size, edit = part.count // times, part.edits[0]
            row = edit.update_row + turn * size
            found.append(dataclasses.replace(edit, first_row=at, rows=size, update_row=row))
            at += size
    return tuple(found)


def order_words(parts: Sequence[Rows], order: Sequence[int]) -> str:
    """What an order of parts is, by the names of the modules."""
    names = [part.edits[0].target.removesuffix(".weight").rpartition(".")[2] if part.edits else "…" for part in parts]
    return f"rows were read as {', '.join(names[number] for number in order)}, but are {', '.join(names)}"


def turned_halves(span: Span, plan: Plan) -> Iterator[Guess]:
    """An update of a fused module as a whole, whose parts were put in another order."""
    edits = [edit for edit in span.edits if not edit.update.replaces]
    if any(edit.rows != span.rows or edit.columns != slice(None) for edit in edits) or not edits:
        return
    sizes = sizes_of(span, plan)
    if len(sizes) < 2 or sum(sizes) != span.rows:
        return
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    for order in [*permutations(range(len(sizes)))][1:]:
        found, at = [e for e in span.edits if e.update.replaces], 0
        for number in order:
            for edit in edits:
                row = edit.update_row + starts[number]
                found.append(dataclasses.replace(edit, first_row=at, rows=sizes[number], update_row=row))
            at += sizes[number]
        shown = ", ".join(str(number + 1) for number in order)
        yield Guess(FUSED_ORDER, f"its {len(sizes)} parts were put in the order {shown}", tuple(found))


def sizes_of(span: Span, plan: Plan) -> list[int]:
    """Rows of the parts of a fused module, by its name and the config; none where it is not known to be fused."""
    module = span.placed.name.removesuffix(".weight")
    fusion = next((f for f in FUSIONS if f.repeats == 1 and (f".{module}").endswith(f".{f.fused}")), None)
    if fusion is None or len(fusion.parts) < 2 or len(span.shape) != 2:
        return []
    heads, keys = setting(plan.base.config, HEADS), setting(plan.base.config, KEY_HEADS)
    if "k" in fusion.sizes and heads and keys:
        each = span.rows // sum(heads if letter == "q" else keys for letter in fusion.sizes)
        return [each * (heads if letter == "q" else keys) for letter in fusion.sizes]
    return [span.rows // len(fusion.parts)] * len(fusion.parts)


def other_slices(span: Span, plan: Plan) -> Iterator[Guess]:
    """Rows of an update of a fused module that belong to another tensor of a base whose parts are apart."""
    if len(span.edits) != 1 or not span.edits[0].shared:
        return
    (edit,) = span.edits
    found: list[tuple[int, str, int]] = []
    for other in plan.edited:
        for theirs in other.edits:
            same = (theirs.adapter, theirs.target, theirs.rows) == (edit.adapter, edit.target, edit.rows)
            if same and theirs.update_row != edit.update_row and other.placed.name != span.placed.name:
                found.append((abs(theirs.update_row - edit.update_row), other.placed.name, theirs.update_row))
    for _, name, row in sorted(found)[:MOST_SLICES]:
        words = f"it has the part of the update that belongs to {name}"
        yield Guess(FUSED_ORDER, words, (dataclasses.replace(edit, update_row=row),))
