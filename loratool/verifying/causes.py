"""Known causes of an update being in a model by another factor than 1, each with the number that it gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loratool.algebra.updates.base import Update
from loratool.bases.edits import Edit
from loratool.verifying.looking import SURE
from loratool.verifying.updates import scaling_of

NOT_MERGED, NOT_MERGED_WORDS = "not-merged", "not merged"


@dataclass(frozen=True)
class Cause:
    """What a tool may have done, and how much of the update is in the model then."""

    code: str
    factor: float
    words: str


def causes_of(factor: float, error: float, edit: Edit, rslora: bool) -> tuple[Cause, ...]:
    """Every known cause that gives a number, within the error with which it was found."""
    return tuple(each for each in known_causes(edit, rslora) if abs(each.factor - factor) <= SURE * error + 1e-6)


def known_causes(edit: Edit, rslora: bool) -> Iterator[Cause]:
    """All that can be told for one update; those that change nothing are left out."""
    return (each for each in every_cause(edit.strength, edit.update, rslora) if abs(each.factor - 1) > 1e-9)


def every_cause(weight: float, update: Update, rslora: bool) -> Iterator[Cause]:
    yield Cause(NOT_MERGED, 0.0, NOT_MERGED_WORDS)
    yield Cause("merged-twice", 2.0, "merged twice")
    yield Cause("wrong-sign", -1.0, "subtracted instead of added")
    if weight:
        yield Cause("weight-ignored", 1 / weight, f"the weight {weight:g} was ignored")
        yield Cause("weight-squared", weight, f"the weight {weight:g} was applied twice")
    scaled = scaling_of(update)
    if scaled is None:
        return
    scale, rank = scaled
    root = math.sqrt(rank)
    alpha = scale * (root if rslora else rank)
    if rslora:
        yield Cause("rslora-read-as-lora", 1 / root, f"scaled by α/r instead of α/√r (rsLoRA read as LoRA, r = {rank})")
        yield Cause("rank-forgotten", root, f"scaled by α instead of α/√r (r = {rank})")
    else:
        yield Cause("lora-read-as-rslora", root, f"scaled by α/√r instead of α/r (LoRA read as rsLoRA, r = {rank})")
        yield Cause("rank-forgotten", float(rank), f"scaled by α instead of α/r (r = {rank})")
    yield Cause("divided-by-rank", 1 / rank, f"divided by the rank {rank} once more")
    yield Cause("multiplied-by-alpha", alpha, f"multiplied by α = {alpha:g} once more")
    if alpha:
        yield Cause("alpha-forgotten", 1 / alpha, f"α = {alpha:g} was left out of the scaling")
    if scale:
        yield Cause("scaling-forgotten", 1 / scale, f"the scaling {scale:g} was left out")
        yield Cause("scaled-twice", scale, f"the scaling {scale:g} was applied twice")
