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
    margins: Tensor,
    lower: List[Tensor],
    upper: List[Tensor],
    memory: Tuple[Tensor, Tensor],
    measure: bool,
) -> Tuple[float, float, Tensor, Tensor, Tensor]:
    """Round both ends of the intervals around W + scale · up @ down, some rows at a time, and tell where they differ.

    Args:
        stored: (n, width) W.
        factors: up, (n, rank + 1), whose last column gives the margins; down, (rank + 1, width), whose last row is ones.
        scale: of the product.
        margins: (n, 1) half the lengths of the intervals.
        lower: (n, width) of a 16-bit dtype, for the lower ends; the same memory as int16; and as integers of up to four
            elements each.
        upper: the same for the upper ends of (rows, width) elements.
        memory: (rows, width) of float32 for W where it is in another dtype, and for the sums.
        measure: whether to measure the product.

    Returns:
        ‖W‖², that of the product if it was to be measured, and of all elements that both ends leave undecided: their
        places in the flat rows, the lower ends of their intervals in float32, and W.
    """
    squared, changed = 0.0, 0.0
    up, down = factors
    weight, change = memory
    rank, width, tile = down.size(0) - 1, stored.size(1), weight.size(0)
    all_places: List[Tensor] = []
    all_sums: List[Tensor] = []
    all_weights: List[Tensor] = []
    lanes = width // lower[2].size(1)
    for at in range(0, stored.size(0), tile):
        rows = stored[at : at + tile]
        count = rows.size(0)
        c = change[:count]
        margin, left = margins[at : at + tile], up[at : at + tile]
        w = rows if rows.dtype == torch.float32 and rows.is_contiguous() else weight[:count].copy_(rows)
        squared += float(torch.linalg.vector_norm(w)) ** 2
        if measure:
            c.addmm_(left[:, :rank], down[:rank], beta=0, alpha=scale)
            changed += float(torch.linalg.vector_norm(c)) ** 2
            c.add_(margin)
        else:
            c.addmm_(left, down, beta=0, alpha=scale)
        c.add_(w)
        upper[0][:count].copy_(c)
        c.sub_(margin, alpha=2)
        lower[0][at : at + tile].copy_(c)
        # few differ: look at several at a time, and then at those that are found
        found = torch.nonzero(upper[2][:count].reshape(-1) != lower[2][at : at + tile].reshape(-1))
        places = (found * lanes + torch.arange(lanes)).view(-1)
        first, second = upper[1][:count].view(-1), lower[1][at : at + tile].view(-1)
        places = places[torch.nonzero(first[places] != second[places]).view(-1)]
        all_sums.append(c.view(-1)[places])
        all_weights.append(w.view(-1)[places])
        all_places.append(places + at * width)
    return squared, changed, torch.cat(all_places), torch.cat(all_sums), torch.cat(all_weights)


def sum_within_margins(
    stored: Tensor,
    product: Tuple[Tensor, Tensor, float],
    errors: Tensor,
    bound: Tuple[float, float, float],
    lower: List[Tensor],
    upper: List[Tensor],
    memory: Tuple[Tensor, Tensor],
    measure: bool,
) -> Tuple[List[float], List[Tensor]]:
    """`sum_and_round`, with margins that follow from the sizes of the rows' elements.

    Args:
        stored: (n, width) W.
        product: up, (n, rank); down, (rank + 1, width), whose last row is ones; and its scale.
        errors: (n,) how far elements of the product may be from the exact values, in float64.
        bound: what underflow takes at most; the error of a sum relative to the largest size; what no element of the
            product is larger than.
        lower: as `sum_and_round` takes it.
        upper: likewise.
        memory: likewise.
        measure: likewise.

    Returns:
        the size that no element of the result is larger than, infinite where W is not finite or numbers are too large for
        float32, in which case nothing was computed; ‖W‖², and that of the product if it was to be measured. Of the elements that are not decided: their
        places in the flat rows, the lower ends of their intervals in float32, W, and half the lengths of the intervals
        in float64; nothing where all are decided.
    """
    none: List[Tensor] = []
    own, down, scale = product
    ends = torch.aminmax(stored)
    largest = max(-float(ends[0]), float(ends[1]))
    largest += bound[2]
    # what is infinite or NaN, and what comes near the largest float32 before it is scaled or after
    if not largest < 2.0**120 * min(1.0, abs(scale)):
        return [math.inf, 0.0, 0.0], none
    margins = (errors + (bound[0] + bound[1] * largest)).mul_(1 + 2.0**-10)
    column = margins.float().unsqueeze(1)
    up = torch.cat([own, column / scale], 1)
    squared, changed, places, sums, weights = sum_and_round(
        stored, (up, down), scale, column, lower, upper, memory, measure
    )
    told = [largest, squared, changed]
    if places.numel() == 0:
        return told, none
    row = torch.div(places, stored.size(1), rounding_mode="floor")
    return told, [places, sums, weights, margins.index_select(0, row)]


def settle(
    elements: List[Tensor],
    first: int,
    width: int,
    result: Tensor,
    parts: List[Tuple[Tensor, Tensor, float, List[int]]],
    groups: List[Tuple[Tensor, Tensor, float, float, List[int]]],
    least: List[float],
) -> Tuple[Tensor, Tensor]:
    """`decide` elements of a block that begins at row `first` of the weight, and put them into `result`, (n, width).

    Returns the places in the flat rows of those that only exact arithmetic decides, and W.
    """
    flat = [elements[0] + first * width, elements[1], elements[2], elements[3]]
    decided, left = decide(flat, result, width, parts, groups, least)
    result.view(-1).index_copy_(0, elements[0], decided)
    return elements[0][left], elements[2][left]


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
    if like.dtype == torch.float32:
        low, high = (sums - margin).float(), (sums + margin).float()
    else:
        low, high = rounded_once(sums - margin, like), rounded_once(sums + margin, like)
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


def decide(
    elements: List[Tensor],
    like: Tensor,
    width: int,
    parts: List[Tuple[Tensor, Tensor, float, List[int]]],
    groups: List[Tuple[Tensor, Tensor, float, float, List[int]]],
    least: List[float],
) -> Tuple[Tensor, Tensor]:
    """Results of single elements by bounds of their own in float32, and then in float64.

    A frame is a place in the weight: its first row, its rows, its first column, the step to the next one, its columns.

    Args:
        elements: places in the flat weight, (count,); in float32 the lower ends of the intervals around the sums, and W;
            in float64 half the lengths of the intervals.
        like: any tensor of the result's dtype, one of 16 bits.
        width: of the weight.
        parts: each with up, (rows, rank), down, (columns, rank), its scale and its frame; or a difference in full,
            (rows, columns), with (columns, 0).
        groups: parts of one place, with the lengths of rows and of columns that bound them, |scale|, the error in float32
            relative to these three, and the frame.
        least: what underflow may take in float32, and in float64.

    Returns:
        the results, (count,), and the numbers of those that are not decided.
    """
    places, lowest, weights, margins = elements[0], elements[1], elements[2], elements[3]
    near = 2.0**-22  # of a size: the roundings of the sum, of its interval's lower end, and of both ends here
    generous = 1 + 2.0**-10
    row = ((places.double() + 0.5) * (1.0 / width)).long()  # faster than whole numbers, and never near the next one
    column = places - row * width
    sums = lowest.double().add_(margins)
    errors = sums.abs().mul_(near).add_(least[0])
    sizes = torch.zeros_like(sums)
    for lengths, spans, scale, relative, frame in groups:
        own, across, inside = within_frame(row, column, frame)
        size = lengths.index_select(0, own).mul_(spans.index_select(0, across)).mul_(scale * generous)
        if inside.numel() > 0:
            size.mul_(inside)
        sizes.add_(size)
        errors.add_(size.add_(margins), alpha=relative + near)
    result, left = either_way(sums, errors.mul_(generous), like)
    if left.numel() == 0:
        return result, left
    row, column = row.index_select(0, left), column.index_select(0, left)
    values = weights.index_select(0, left).double()
    sizes = sizes.index_select(0, left).add_(values.abs())
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
    errors = sizes.mul_(terms * 2.0**-53 * generous).add_(terms * least[1])
    # by way of float32 numbers are rounded twice, which is right at a distance of a step of float32 from a tie
    settled, few = either_way(values, values.abs().mul_(2.0**-23 * generous).add_(errors), like)
    if few.numel() > 0:
        values, errors = values[few], errors[few]
        low, high = rounded_once(values - errors, like), rounded_once(values + errors, like)
        settled[few] = low
        few = few[torch.nonzero(unlike(low, high) | low.isfinite().logical_not()).view(-1)]
    result[left] = settled
    return result, left[few]


def rounded_once(values: Tensor, like: Tensor) -> Tensor:
    """Finite float64 rounded once to a 16-bit dtype: a float32 at a tie goes where what it lost points to."""
    single = values.float()
    result = single.to(like.dtype)
    beyond = single - result.float()
    other = single + beyond  # at a tie the number on the other side
    tie = (beyond != 0) & (other.to(like.dtype).float() == other)
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


def either_way(values: Tensor, errors: Tensor, like: Tensor) -> Tuple[Tensor, Tensor]:
    """Values in float64, give or take an error, rounded; and the numbers of those that may be rounded either way."""
    low, high = (values - errors).float().to(like.dtype), (values + errors).float().to(like.dtype)
    return low, torch.nonzero(unlike(low, high)).view(-1)


def unlike(one: Tensor, other: Tensor) -> Tensor:
    """Where two are not the same number, −0 being another one than 0."""
    return (one != other) | ((one == 0) & (one.signbit() != other.signbit()))
