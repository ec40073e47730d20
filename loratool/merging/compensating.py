"""Updates changed a little, so that the rounded weight holds the whole of the update that is meant.

Where an update is small against the steps of a 16-bit dtype, rounding to the nearest takes a part of it away. So the
update U C Vᵀ, U and V orthonormal, is corrected by what is missing of E = round(W + update) − W:

1. in its core, C ← C + (C₀ − UᵀEV), a few times, on a fixed sample of rows;
2. in every column, whose r numbers UᵀE are to be those of UᵀΔW: outliers of the input have columns of their own;
3. in every row, whose r numbers EV are to be those of ΔW V;
4. in its core again, for the last two take a little of each other's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from loratool.lazy import Tensor, torch
from loratool.merging.addends import Addend, by_place
from loratool.merging.exact_rows import ExactSum

SAMPLED = 1 << 20  # elements of a weight that a core is corrected on
RUN = 8  # rows of the sample that lie next to each other
TILE = 1 << 18  # elements of all rows that are looked at at a time
MOST_PASSES = 8
CLOSE = 2e-3  # of what is meant, along it: nearer than the noise of the sample


def compensate(total: ExactSum, parts: Sequence[Addend], read: Callable[[Tensor], Tensor]) -> list[Addend]:
    """The parts of a sum with those of a place in one, which is corrected; differences in full stay as they are.

    It is done on the CPU and in one order, so that the result depends on nothing but the inputs and the machine.

    Args:
        total: the sum, on the CPU.
        parts: all of its parts.
        read: gives rows of W, (n, width) in float32 or float64, for their numbers.
    """
    result: list[Addend] = []
    for group in by_place(parts):
        result += [Compensation(total, group, read).corrected()] if group[0].down is not None else group
    return result


class Compensation:
    """The update of one place on its way: U · liftᵀ + extra · Vᵀ in the dtype that W is read in."""

    def __init__(self, total: ExactSum, group: Sequence[Addend], read: Callable[[Tensor], Tensor]) -> None:
        self.total, self.group, self.place, self.read = total, group, group[0].place, read
        up = torch.cat([part.up.double() * part.scale for part in group], 1)
        down = torch.cat([part.down.double() for part in group if part.down is not None], 0)
        self.wide_left, one = torch.linalg.qr(up)
        right, other = torch.linalg.qr(down.T)
        self.core = one @ other.T  # (rank, rank), as it is meant
        work = total.exact
        self.left, self.right = self.wide_left.to(work), right.to(work)  # U (rows, rank), V (columns, rank)
        self.meant = (right @ self.core.T).to(work)  # what `lift` begins as
        self.lift, self.extra = self.meant.clone(), torch.zeros_like(self.left)

    def corrected(self) -> Addend:
        """The corrected update."""
        self.correct_core()
        self.correct_columns()
        self.correct_rows()
        self.correct_core()
        up, down = torch.cat([self.left, self.extra], 1), torch.cat([self.lift, self.right], 1).T
        device = self.group[0].up.device
        return replace(self.group[0], up=up.float().to(device), down=down.float().contiguous().to(device), scale=1.0)

    def looked_at(self, rows: Tensor) -> Callable[[], Tensor]:
        """What gives E of some rows, as the update is at that time; other parts of the sum are there, and not in it."""
        weight, others = (each[:, self.place.columns] for each in self.rows_of(rows))
        others = others - self.left[rows] @ self.meant.T

        def held() -> Tensor:
            change = self.left[rows] @ self.lift.T + self.extra[rows] @ self.right.T + others
            rounded: Tensor = (weight + change).to(self.total.target).to(weight.dtype) - weight - others
            return rounded.nan_to_num(0.0, 0.0, 0.0)  # beyond the range of the dtype; the merge will tell

        return held

    def rows_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """W, and ΔW of all parts, of some rows."""
        numbers = rows + self.place.first
        return self.read(numbers), self.total.change_of(numbers).to(self.left.dtype)

    def correct_core(self) -> None:
        rows = sample(self.place.rows, max(8 * self.left.shape[1], SAMPLED // max(self.place.width, 1)))
        inverse, held = torch.linalg.pinv(self.wide_left[rows]), self.looked_at(rows)
        for _ in range(MOST_PASSES):
            missing = self.core - inverse @ (held() @ self.right).double()
            self.extra += (self.wide_left @ missing).to(self.extra.dtype)
            if abs(float((missing * self.core).sum())) <= CLOSE * float(self.core.square().sum()):
                break

    def correct_columns(self) -> None:
        got = torch.zeros_like(self.lift)
        for rows in self.tiles():
            got += self.looked_at(rows)().T @ self.left[rows]
        self.lift += self.meant - got

    def correct_rows(self) -> None:
        meant = (self.wide_left @ self.core).to(self.extra.dtype)
        for rows in self.tiles():
            self.extra[rows] += meant[rows] - self.looked_at(rows)() @ self.right

    def tiles(self) -> Iterator[Tensor]:
        """The numbers of all rows of the place, some at a time."""
        step = max(1, TILE // max(self.total.width, 1))
        for first in range(0, self.place.rows, step):
            yield torch.arange(first, min(first + step, self.place.rows))


def sample(rows: int, wanted: int) -> Tensor:
    """The numbers of about `wanted` of so many rows, evenly spread in runs; of all where they are few."""
    if rows <= wanted:
        return torch.arange(rows)
    runs = max(1, wanted // RUN)
    first = torch.arange(runs) * (rows - RUN) // max(runs - 1, 1)
    found: Tensor = torch.unique(first[:, None] + torch.arange(RUN))
    return found
