"""The arithmetic on many elements, as functions that TorchScript can run from their first line to their last.

Python's threads take turns at its lock, and wait for it after every call into torch: on sixteen cores that takes longer
than the arithmetic. TorchScript takes a whole function without the lock. Where it cannot (it is not maintained for
Python 3.14 and later), the same functions are run as they are. This module imports torch when it is imported, so it is
imported where rows are computed.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, List, ParamSpec, Tuple, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
COMPILING = Lock()  # Python 3.11 counts the depth of what it parses for all threads together, and fails where two parse


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs without Python's lock, if possible."""
    with COMPILING:
        script = script_of(function)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.jit.optimized_execution(False):  # which takes longer than it saves, for shapes vary
            result: R = script(*args, **kwargs)
        return result

    return function if script is None else run


@cache
def script_of(function: Callable[..., object]) -> Any:
    """It as TorchScript; None where this Python or an installation without sources has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecation
            return torch.jit.script(function)
    except (RuntimeError, OSError, NotImplementedError):
        return None


def sum_and_round(
    stored: Tensor,
    factors: Tuple[Tensor, Tensor],
    scale: float,
    margins: Tuple[Tensor, Tensor],
    lower: List[Tensor],
    upper: List[Tensor],
    memory: Tuple[Tensor, Tensor],
    measure: bool,
) -> Tuple[float, float, Tensor]:
    """Round both ends of the intervals around W + scale · up @ down, some rows at a time, and tell where they differ.

    Args:
        stored: (n, width) W.
        factors: up, (n, rank + 1), whose last column gives the margins; down, (rank + 1, width), whose last row is ones.
        scale: of the product.
        margins: what makes sums upper ends, (n, 1), and how far below these the lower ends are, (n, 1).
        lower: (n, width) of a 16-bit dtype, for the lower ends; the same memory as int16; and as integers of up to four
            elements each.
        upper: the same for the upper ends of (rows, width) elements; then as many bools as there are integers, for where
            the ends differ, and their memory as int64.
        memory: (rows, width) of float32 for W where it is in another dtype, and for the sums.
        measure: whether to measure the product.

    Returns:
        ‖W‖², that of the product if it was to be measured, and the places in the flat rows of all elements that both ends
        leave undecided.
    """
    squared, changed = 0.0, 0.0
    up, down = factors
    weight, change = memory
    rank, width, tile = down.size(0) - 1, stored.size(1), weight.size(0)
    lanes = width // lower[2].size(1)
    folded = lower[2].size(1) % 8 == 0  # eight flags of a comparison are one integer
    group = lanes * 8 if folded else lanes
    groups: List[Tensor] = []
    ends: List[Tensor] = []
    for at in range(0, stored.size(0), tile):
        rows = stored[at : at + tile]
        count = rows.size(0)
        c = change[:count]
        left = up[at : at + tile]
        w = rows if rows.dtype == torch.float32 and rows.is_contiguous() else weight[:count].copy_(rows)
        squared += float(torch.linalg.vector_norm(w)) ** 2
        if measure:
            c.addmm_(left[:, :rank], down[:rank], beta=0, alpha=scale)
            changed += float(torch.linalg.vector_norm(c)) ** 2
            c.add_(margins[0][at : at + tile])
        else:
            c.addmm_(left, down, beta=0, alpha=scale)
        c.add_(w)
        upper[0][:count].copy_(c)
        c.sub_(margins[1][at : at + tile])
        lower[0][at : at + tile].copy_(c)
        # few differ: the groups that they are in are found first, and looked at when all rows are done
        some = count * width // lanes
        torch.ne(upper[2][:count].view(-1), lower[2][at : at + tile].view(-1), out=upper[3][:some])
        found = torch.nonzero(upper[4][: some // 8] if folded else upper[3][:some]).view(-1)
        ends.append(upper[1][:count].view(-1, group).index_select(0, found))
        groups.append(found + at * width // group)
    every = torch.cat(groups)
    undecided = torch.nonzero(torch.cat(ends) != lower[1].view(-1, group).index_select(0, every))
    return squared, changed, every.index_select(0, undecided.select(1, 0)) * group + undecided.select(1, 1)


def sum_within_margins(
    stored: Tensor,
    product: Tuple[Tensor, Tensor, float],
    bounds: Tuple[Tensor, Tensor],
    underflow: float,
    lower: List[Tensor],
    upper: List[Tensor],
    memory: Tuple[Tensor, Tensor],
    measure: bool,
) -> Tuple[List[float], Tensor]:
    """`sum_and_round`, with margins that follow from the sizes of the rows' elements.

    With ε for the error of a computed ΔW and ρ for that of one more rounding, W + (ΔW + ε + ρ) is computed with an error
    of at most ε + ρ, so that it is no less than the exact value x and no more than x + 2 (ε + ρ). What is 2 (ε + ρ) + ρ
    less is therefore no more than x once it is rounded.

    Args:
        stored: (n, width) W.
        product: up, (n, rank); down, (rank + 1, width), whose last row is ones; and its scale.
        bounds: of the rows of the product, in float64: how far elements may be from the exact values, (n,), and what none
            is larger than, (n,).
        underflow: what it takes from an element at most.
        lower: as `sum_and_round` takes it.
        upper: likewise.
        memory: likewise.
        measure: likewise.

    Returns:
        the size that no element of the result is larger than, infinite where W is not finite or numbers are too large for
        float32, in which case nothing was computed; ‖W‖², and that of the product if it was to be measured. And the
        places of the elements that are not decided, in the flat rows.
    """
    own, down, scale = product
    ends = torch.aminmax(stored)
    size = max(-float(ends[0]), float(ends[1]))
    largest = size + float(bounds[1].max())
    # what is infinite or NaN, and what comes near the largest float32 before it is scaled or after
    if not largest < 2.0**120 * min(1.0, abs(scale)):
        return [math.inf, 0.0, 0.0], torch.zeros(0, dtype=torch.int64)
    generous = 1 + 2.0**-10
    rounding = (bounds[1] + size) * (2.0**-24 * generous)
    margins = (bounds[0] + underflow) * generous + rounding
    raised, length = margins.float().unsqueeze(1), (2 * margins + rounding).float().unsqueeze(1)
    up = torch.cat([own, raised / scale], 1)
    squared, changed, places = sum_and_round(stored, (up, down), scale, (raised, length), lower, upper, memory, measure)
    return [largest, squared, changed], places


def settle(
    places: Tensor,
    stored: Tensor,
    first: int,
    result: Tensor,
    parts: List[Tuple[Tensor, Tensor, float, List[int]]],
    largest: float,
    least: float,
) -> Tensor:
    """Compute elements of a block in float64, and put them into its rows; those are left that this cannot decide either.

    A frame is a place in the weight: its first row, its rows, its first column, the step to the next one, its columns.

    Args:
        places: (count,) in the flat rows of the block.
        stored: (n, width) W.
        first: the weight's row with which the block begins.
        result: (n, width) of a 16-bit dtype.
        parts: each with up, (rows, rank), down, (columns, rank), its scale and its frame; or a difference in full,
            (rows, columns), with (columns, 0).
        largest: the size that no element is larger than, nor the sum of the sizes of all that it is the sum of.
        least: what underflow may take from a term.

    Returns:
        the places that only exact arithmetic decides.
    """
    width = stored.size(1)
    row = ((places.double() + 0.5) * (1.0 / width)).long()  # faster than whole numbers, and never near the next one
    column = places - row * width
    row += first
    values = stored.reshape(-1).index_select(0, places).double()
    terms = 4
    for up, turned, scale, frame in parts:
        own, across, inside = within_frame(row, column, frame)
        if turned.size(1) > 0:
            value = up.index_select(0, own).double().mul_(turned.index_select(0, across)).sum(1)
        else:
            value = up[own, across].double()
        if inside.numel() > 0:
            value.mul_(inside)
        values.add_(value, alpha=scale)
        terms += max(1, turned.size(1)) + 4
    margin = terms * (largest * 2.0**-53 * (1 + 2.0**-10) + least)
    low, left = decide_wide(values, margin, result)
    result.view(-1).index_copy_(0, places, low)
    return places.index_select(0, left)


def sum_and_round_wide(
    stored: Tensor,
    product: Tuple[Tensor, Tensor, float],
    bound: Tuple[float, float, float],
    near: Tuple[int, float, float],
    lower: List[Tensor],
    memory: Tuple[Tensor, Tensor],
    single: List[Tensor],
    measure: bool,
) -> Tuple[Tensor, Tensor]:
    """Round W + scale · up @ down, computed in float64, some rows at a time, and tell what may be rounded either way.

    Nothing is asked of a GPU before all of it is on its way, but how many elements are undecided.

    Args:
        stored: (n, width) W.
        product: up, (n, rank), and down, (rank, width), in float64, and its scale.
        bound: what no element of the product is larger than; the error of a sum relative to the largest size; and apart
            from it.
        near: half the step of the result's last bit in a float32's bits, 0 where the result is float32; the size from
            which on that holds; and what a float32 is rounded by relative to its size.
        lower: (n, width) of float32 or a 16-bit dtype, for the results; the same memory as integers.
        memory: (rows, width) of float64, for W and for the sums.
        single: (rows, width) of float32; the same memory as integers.
        measure: whether to measure the product.

    Returns:
        in float64 on the CPU: ‖W‖², that of the product if it was to be measured, the largest size of a sum, not finite
        where W is not, and half the length of the interval around each sum; then the sums of all undecided elements, and
        then W. And their places in the flat rows, on the device.
    """
    up, down, scale = product
    weight, change = memory
    width, tile = stored.size(1), weight.size(0)
    zero = torch.zeros([1], dtype=torch.float64, device=stored.device)
    squared, changed, largest, most = zero, zero, zero, zero
    places: List[Tensor] = []
    sums: List[Tensor] = []
    weights: List[Tensor] = []
    for at in range(0, stored.size(0), tile):
        rows = stored[at : at + tile]
        count = rows.size(0)
        w, c, result = weight[:count].copy_(rows), change[:count], lower[0][at : at + tile]
        short, bits = single[0][:count], single[1][:count]
        c.addmm_(up[at : at + tile], down, beta=0, alpha=scale)
        squared = squared + torch.linalg.vector_norm(w).square()
        if measure:
            changed = changed + torch.linalg.vector_norm(c).square()
        ends = torch.aminmax(w)
        size = torch.maximum(-ends[0], ends[1]) + bound[0]
        margin = size * bound[1] + bound[2]
        c.add_(w)
        if near[0] == 0:
            result.copy_(c - margin)
            short.copy_(c + margin)
            unsure = bits != lower[1][at : at + tile]
        else:
            result.copy_(short.copy_(c))
            # whatever float32 is not at a tie is half a step of float32 away from one, and that is more than the margin
            unsure = (bits & (2 * near[0] - 1)) == near[0]
            unsure |= short.abs_() < torch.clamp(margin / near[2], min=near[1])
        found = torch.nonzero(unsure.view(-1)).view(-1)
        places.append(found + at * width)
        sums.append(c.view(-1)[found])
        weights.append(w.view(-1)[found])
        largest, most = torch.maximum(largest, size), torch.maximum(most, margin)
    told = [squared, changed, largest.view(1), most.view(1)]
    told.extend(sums)
    told.extend(weights)
    return torch.cat(told).cpu(), torch.cat(places)


def decide_wide(sums: Tensor, margin: float, like: Tensor) -> Tuple[Tensor, Tensor]:
    """Sums in float64, each give or take a margin, rounded once; and the numbers of those that may go either way.

    `like` is any tensor of the result's dtype, of float32 or 16 bits.
    """
    ends = torch.cat([sums - margin, sums + margin])
    both = ends.float() if like.dtype == torch.float32 else rounded_once(ends, like)
    low, high = both.chunk(2)
    return low, torch.nonzero(unlike(low, high)).view(-1)


def kept_in_rows(before: Tensor, after: Tensor, factors: Tuple[Tensor, Tensor], scale: float) -> Tuple[float, float]:
    """⟨W' − W, ΔW⟩ and ‖ΔW‖² of some rows.

    Args:
        before: (n, width) of W.
        after: (n, width) of W'.
        factors: up, (n, rank), and down, (rank, width), whose product times `scale` is ΔW.
        scale: of the product.
    """
    change = torch.mm(factors[0], factors[1]).mul_(scale)
    applied = after.to(change.dtype) - before.to(change.dtype)  # neither may be written to
    squared = torch.linalg.vector_norm(change).double().square()
    both = torch.stack([applied.mul_(change).sum(1).sum(dtype=torch.float64), squared]).cpu()
    return float(both[0]), float(both[1])


def round_sums(stored: Tensor, up: Tensor, down: Tensor, scale: float, memory: Tensor, rounded: Tensor) -> None:
    """Put W + scale · up @ down, computed in float32, into `rounded`, some rows at a time.

    Args:
        stored: (n, width) W.
        up: (n, rank).
        down: (rank, width).
        scale: of the product.
        memory: (rows, width) of float32 for the sums.
        rounded: (n, width) of a narrower dtype.
    """
    tile = memory.size(0)
    for at in range(0, stored.size(0), tile):
        rows = stored[at : at + tile]
        sums = memory[: rows.size(0)]
        sums.copy_(rows)
        sums.addmm_(up[at : at + tile], down, alpha=scale)
        rounded[at : at + tile].copy_(sums)


def rounded_once(values: Tensor, like: Tensor) -> Tensor:
    """Finite float64 rounded once to a 16-bit dtype: a float32 at a tie goes where what it lost points to."""
    single = values.float()
    result = single.to(like.dtype)
    beyond = single - result.float()
    other = single + beyond  # at a tie the number on the other side
    tie = (beyond != 0) & result.isfinite() & (other.to(like.dtype).float() == other)
    return torch.where(tie & ((values - single) * beyond > 0), other.to(like.dtype), result)


def within_frame(row: Tensor, column: Tensor, frame: List[int]) -> Tuple[Tensor, Tensor, Tensor]:
    """Own rows and columns of single elements, and which elements are in a frame; nothing where all are."""
    own, across, inside = row - frame[0], column, torch.zeros(0, dtype=torch.bool)
    if int(own.min()) < 0 or int(own.max()) >= frame[1]:
        inside = (own >= 0) & (own < frame[1])
        own = own.clamp(0, frame[1] - 1)
    if frame[2] != 0 or frame[3] != 1 or int(column.max()) >= frame[4]:
        across = torch.div(column - frame[2], frame[3], rounding_mode="floor").clamp(0, frame[4] - 1)
        met = across * frame[3] + frame[2] == column
        inside = met if inside.numel() == 0 else inside & met
    return own, across, inside


def unlike(one: Tensor, other: Tensor) -> Tensor:
    """Where two are not the same number, −0 being another one than 0."""
    return (one != other) | ((one == 0) & (one.signbit() != other.signbit()))
