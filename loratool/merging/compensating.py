"""Updates changed a little, so that the rounded weight holds the whole of the update that is meant.

Where an update is small against the steps of a 16-bit dtype, rounding to the nearest takes a part of it away, the same
part everywhere. So the core C of the update U C Vᵀ, r × r, is corrected until UᵀEV of what the rounded weight E holds
is the core that is meant: C ← C + (C₀ − UᵀEV), a few times, on a fixed sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from loratool.lazy import Tensor, torch
from loratool.merging.exact_rows import ExactSum, Part

SAMPLED = 1 << 20  # elements of a weight that a core is corrected on
RUN = 8  # rows of the sample that lie next to each other
MOST_PASSES = 8
CLOSE = 2e-3  # of what is meant, along it: nearer than the noise of the sample


def compensate(total: ExactSum, parts: Sequence[Part], read: Callable[[Tensor], Tensor]) -> list[Part]:
    """The parts of a sum with those of a place in one, whose core is corrected; differences in full stay as they are.

    It is done on the CPU and in one order, so that the result depends on nothing but the inputs and the machine.

    Args:
        total: the sum, on the CPU.
        parts: all of its parts.
        read: gives rows of W, (n, width) in float32 or float64, for their numbers.
    """
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        place = part.place
        groups.setdefault((place.first, place.rows, str(place.columns), part.down is None), []).append(part)
    result: list[Part] = []
    for group in groups.values():
        result += [corrected(total, group, read)] if group[0].down is not None else group
    return result


def corrected(total: ExactSum, group: Sequence[Part], read: Callable[[Tensor], Tensor]) -> Part:
    """The parts of one place as one, whose core is corrected."""
    place = group[0].place
    up = torch.cat([part.up.double() * part.scale for part in group], 1)
    down = torch.cat([part.down.double() for part in group if part.down is not None], 0)
    left, one = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.T)
    wanted = one @ other.T
    rows = sample(place.rows, max(8 * up.shape[1], SAMPLED // max(place.width, 1)))
    weight = read(rows + place.first)
    others = total.change_of(rows + place.first)[:, place.columns]
    weight = weight[:, place.columns]
    some = left[rows]
    inverse = torch.linalg.pinv(some)
    single, across = some.to(weight.dtype), right.to(weight.dtype)
    others -= (single @ wanted.to(weight.dtype)) @ across.T
    core = wanted.clone()
    for _ in range(MOST_PASSES):
        change = (single @ core.to(weight.dtype)) @ across.T + others
        held = (weight + change).to(total.target).to(weight.dtype) - weight - others
        missing = wanted - inverse @ (held @ across).double()
        if not bool(missing.isfinite().all()):
            break  # beyond the range of the dtype; the merge will tell
        core += missing
        if abs(float((missing * wanted).sum())) <= CLOSE * float(wanted.square().sum()):
            break
    device = group[0].up.device
    factors = (left @ core).float().to(device), right.T.float().contiguous().to(device)
    return replace(group[0], up=factors[0], down=factors[1], scale=1.0)


def sample(rows: int, wanted: int) -> Tensor:
    """The numbers of about `wanted` of so many rows, evenly spread in runs; of all where they are few."""
    if rows <= wanted:
        return torch.arange(rows)
    runs = max(1, wanted // RUN)
    first = torch.arange(runs) * (rows - RUN) // max(runs - 1, 1)
    found: Tensor = torch.unique(first[:, None] + torch.arange(RUN))
    return found
