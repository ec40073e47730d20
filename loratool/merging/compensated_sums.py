"""An exact sum with its updates corrected one by one, where torch computes it: parts of fused weights, experts, and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.lazy import NDArray, numpy, torch
from loratool.merging.addends import ALL, Addend, by_place
from loratool.merging.compensating import Read, compensated
from loratool.merging.exact_rows import ExactSum

NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16"}


def compensated_sum(total: ExactSum, read: Read) -> ExactSum:
    """A sum on its device whose products are corrected, those of one place in one; differences in full stay as they are.

    Args:
        total: the sum.
        read: puts rows of W, from some row on, into (n, width) of float32.
    """
    parts = [on(part, torch.device("cpu")) for part in total.parts]
    result: list[Addend] = []
    for group in by_place(parts):
        result += group if group[0].down is None else [corrected(total, group, parts, read)]
    made = (on(part, total.parts[0].up.device) for part in result)
    return ExactSum(made, total.width, total.target, total.exact, total.rows)


def corrected(total: ExactSum, group: Sequence[Addend], parts: Sequence[Addend], read: Read) -> Addend:
    """The products of one place in one, corrected; all parts of the sum are on the CPU."""
    place = group[0].place
    others = [part for part in parts if part.place.meets(place.first, place.stop) and part.place != place]
    others += [part for part in parts if part.place == place and part.down is None]
    rest = ExactSum(others, total.width, total.target, total.exact, total.rows) if others else None

    def read_place(values: NDArray[numpy.float32], first: int) -> None:
        whole = place.columns == ALL
        rows = values if whole else numpy.empty((len(values), total.width), numpy.float32)
        read(rows, place.first + first)
        if rest is not None:
            numbers = torch.arange(place.first + first, place.first + first + len(rows))
            rows += rest.change_of(numbers).float().numpy()
        if not whole:
            values[:] = rows[:, place.columns]

    up = torch.cat([part.up.double() * part.scale for part in group], 1)
    down = torch.cat([part.down.double() for part in group if part.down is not None], 0)
    found = compensated(up.numpy(), down.numpy(), 1.0, read_place, NAMES[str(total.target)])
    up, down = map(torch.from_numpy, found)
    return replace(group[0], up=up, down=down, scale=1.0)


def on(part: Addend, device: torch.device) -> Addend:
    """The same part on a device."""
    return replace(part, up=part.up.to(device), down=None if part.down is None else part.down.to(device))
