"""Tensors that no adapter changes, and that differ from the base's: how far, and whether by an update of low rank."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch
from loratool.verifying.looking import MOST_NOISE, Look
from loratool.verifying.pairing import Pair

MOST_ROWS = 256  # of a difference whose rank is looked at
MOST_COLUMNS = 1024
SHUFFLES, CLEAR = 4, 1.1  # of signs; times the largest singular value that they give


@dataclass(frozen=True)
class Changed:
    """How a tensor differs from the base's."""

    relative: float  # ‖W' − W‖ / ‖W‖
    is_matrix: bool
    rank: int  # of what was added, as far as rounding leaves it to be seen; 0 where it is not low
    packed: bool = False  # whether it is quantised
    is_noise: bool = False  # whether it is no farther from the base's than what another method of packing may add


def look_at(pair: Pair) -> Changed:
    """How a tensor of floats differs from the base's, by some of its rows."""
    shape = pair.span.shape
    if pair.span.placed.dtype not in FLOAT_NAMES:
        return Changed(float("inf"), False, 0)
    look = Look(pair, ())
    difference = look.theirs - look.stored
    size = float(torch.linalg.vector_norm(look.stored))
    relative = float(torch.linalg.vector_norm(difference)) / size if size else float("inf")
    is_matrix = len(shape) >= 2 and min(pair.span.rows, pair.span.width) > 1
    rank = low_rank(look, difference) if is_matrix else 0
    is_noise = look.packed is not None and float(difference.square().sum()) <= MOST_NOISE * float(look.grain.sum())
    return Changed(relative, is_matrix, rank, look.packed is not None, is_noise and not rank)


def rank_in_noise(difference: Tensor) -> int:
    """How many singular values stand out of those of the same elements with random signs, which have no structure."""
    numbers = torch.Generator().manual_seed(0)
    noise = max(
        float(
            torch.linalg.matrix_norm(difference * (torch.randint(0, 2, difference.shape, generator=numbers) * 2 - 1), 2)
        )
        for _ in range(SHUFFLES)
    )
    found = int((torch.linalg.svdvals(difference) > CLEAR * noise).sum())
    return found if found <= min(difference.shape) // 2 else 0


def low_rank(look: Look, difference: Tensor) -> int:
    """The rank of a difference, but for what rounding adds to it; 0 where that is more than half of the full rank.

    Single elements that differ have a rank, too, which is none of an update.
    """
    step = max(1, len(difference) // MOST_ROWS)
    some, grain = (each[::step][:MOST_ROWS, :MOST_COLUMNS] for each in (difference, look.grain))
    if not bool(some.isfinite().all()):
        return 0
    if look.packed is not None:
        return rank_in_noise(some)
    noise = float(grain.sum())
    squares = torch.linalg.svdvals(some).square()
    left = squares.flip(0).cumsum(0).flip(0)  # what the values from each on hold together
    count = len(squares)
    if float(left[0]) <= 8 * noise:  # too small to be told from rounding
        return 0
    for rank in range(1, count // 2 + 1):
        if float(left[rank]) <= 2 * noise * (count - rank) / count + 1e-9 * float(left[0]):
            changed = int((some.square() > 4 * grain).sum())  # by more than half a step
            return rank if changed >= rank * count else 0
    return 0
