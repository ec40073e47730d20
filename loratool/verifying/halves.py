"""Updates in two halves: what an initialisation took from W before training, and what was added after it.

PiSSA and the like take a part of W away, and PEFT rounds what is left to the dtype of W before it adds the trained
update. It can also convert such an adapter to LoRA of twice the rank, whose second half is the part that was taken, by
factors that were rounded to the dtype of W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loratool.algebra.rounding import round_once
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.residual import Residual
from loratool.bases.edits import Edit
from loratool.lazy import Tensor, torch
from loratool.verifying.distances import ulp_of
from loratool.verifying.looking import Look
from loratool.verifying.updates import Updates

LEAST_ROWS = 4  # for each rank, so that what is not in the space of the factors can be told from rounding
MOST_OFF = 0.02  # of the part that was taken: rounding both of its factors to 8 digits changes less


def in_halves(edits: Sequence[Edit]) -> bool:
    """Whether updates take something from W and add something else: what training began with, and what it ended with.

    PiSSA and the like do, and so may LoRA of an even rank: PEFT converts them to factors of twice the rank, whose second
    half is what they took.
    """
    return bool(edits) and all(
        isinstance(each.update, Residual) or (isinstance(each.update, LowRank) and each.update.rank % 2 == 0)
        for each in edits
    )


def takes_part(edits: Sequence[Edit]) -> bool:
    """Whether an update takes something from W that is worked out from W."""
    return any(isinstance(each.update, Residual) for each in edits)


def half_of(update: Update, number: int) -> Update:
    """The first or the second half of a low-rank update's factors."""
    assert isinstance(update, LowRank), "others are not in halves"
    middle = update.rank // 2
    own = slice(middle) if number == 0 else slice(middle, None)
    return dataclasses.replace(update, up=update.up[:, own], down=update.down[own])


def residual_of(updates: Updates, weight: Tensor, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is left of rows of W in a dtype, in float64, and what is added to it after training, (n, width) each."""
    steps = []
    for number in (1, 0):
        total = torch.zeros_like(weight)
        for each in updates.others:
            dataclasses.replace(each, update=half_of(each.update, number)).apply(total, first, weight)
        steps.append(total)
    return round_once(weight + steps[0], dtype).double(), steps[1]


def off_in_part(look: Look) -> float | None:
    """By how much of its size the part that was taken is another one, where nothing else differs; None otherwise.

    What differs is (B + δB)(A + δA) − BA, but for the product of both errors: beyond the columns of B and the rows of A
    there is nothing of it.
    """
    edits = look.edits
    if len(edits) != 1 or not in_halves(edits) or edits[0].columns != slice(None) or look.target.itemsize != 2:
        return None
    updates, (edit,) = Updates(look.span, torch.device("cpu"), edits), edits
    if len(updates.others) != 1:
        return None
    part = half_of(updates.others[0].update, 1)
    assert isinstance(part, LowRank)
    rows = torch.cat([torch.arange(first, first + count) for first, count in look.runs])
    if edit.first_row or edit.rows != look.span.rows or min(len(rows), part.down.shape[1]) < LEAST_ROWS * part.rank:
        return None
    up, change = part.up[rows + edit.update_row], sum(look.changes, torch.zeros_like(look.weight))
    taken = up @ part.down * part.scale * edit.strength
    off = look.theirs - look.weight - change
    sizes = (look.theirs.abs(), (look.weight + taken).abs())
    noise = float(sum((ulp_of(size, look.target).square() / 12).sum() for size in sizes))
    columns, across = (torch.linalg.qr(each)[0] for each in (up, part.down.T))
    left = off - columns @ (columns.T @ off)
    left = left - (left @ across) @ across.T
    found = float(torch.linalg.vector_norm(off - left) / torch.linalg.vector_norm(taken))
    return found if float(left.square().sum()) <= 2 * noise and found <= MOST_OFF else None
