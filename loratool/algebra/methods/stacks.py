"""Several matrices of one shape seen together, some rows at a time, and exact quantiles of their entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from loratool.algebra.lowrank.products import Product, padded
from loratool.lazy import Tensor, torch

CPU_TILE = 1 << 20  # entries of all matrices in a tile: near a core's cache
CUDA_TILE = 1 << 26
HALF = 16  # bits of a float32 that one pass counts

Statistic = Callable[[int, "Tensor"], "Tensor"]  # of (first row, tile): (k, rows, columns), none negative


class Stack(Protocol):
    """n matrices; going through them gives the same numbers every time."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """n, rows, columns."""

    @property
    def device(self) -> torch.device:
        """Where tiles come."""

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, (n, count, columns)) of all rows, in order."""

    def largest(self, statistic: Statistic, counts: Sequence[int]) -> Tensor:
        """The `counts`[k]-th largest value of each of the k statistics over all entries, exactly; (k,)."""


@dataclass(frozen=True)
class Held:
    """Matrices that are in memory, such as those of a core space."""

    matrices: Tensor  # (n, rows, columns)

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rows, columns = self.matrices.shape
        return (count, rows, columns)

    @property
    def device(self) -> torch.device:
        return self.matrices.device

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.matrices

    def largest(self, statistic: Statistic, counts: Sequence[int]) -> Tensor:
        found = statistic(0, self.matrices).flatten(1)
        rows = [row.kthvalue(row.numel() - count + 1).values for row, count in zip(found, counts, strict=True)]
        return torch.stack(rows)


@dataclass(frozen=True)
class Formed:
    """Products whose entries are formed tile by tile: in float64, then float32, so that tiles cut otherwise agree."""

    products: Sequence[Product]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.products), *self.products[0].shape)

    @property
    def device(self) -> torch.device:
        return self.products[0].up.device

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Up (n, rows, rank) and down (n, rank, columns), smaller ranks padded with zeros."""
        rank = max(p.rank for p in self.products)
        even = [padded(p.to(torch.float64), rank) for p in self.products]
        return torch.stack([p.up for p in even]), torch.stack([p.down for p in even])

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        count, rows, columns = self.shape
        up, down = self.factors
        entries = CUDA_TILE if self.device.type == "cuda" else CPU_TILE
        step = max(1, entries // (count * columns))
        for first in range(0, rows, step):
            yield first, (up[:, first : first + step] @ down).float()

    def largest(self, statistic: Statistic, counts: Sequence[int]) -> Tensor:
        """By counting: float32 numbers that are not negative are in the order of their bits, and 16 go at a time."""
        bins = 1 << HALF

        def count(wanted: Sequence[int] | None) -> list[Tensor]:
            """How often each upper half occurs, or each lower half below the `wanted` upper ones."""
            found = [torch.zeros(bins, dtype=torch.int64, device=self.device) for _ in counts]
            for first, tile in self.tiles():
                bits = statistic(first, tile).float().contiguous().view(torch.int32).flatten(1)
                for at, row in enumerate(bits):
                    upper = row >> HALF
                    part = upper if wanted is None else row[upper == wanted[at]] & (bins - 1)
                    found[at] += torch.bincount(part, minlength=bins)
            return found

        uppers, rests = [], []
        for histogram, needed in zip(count(None), counts, strict=True):
            upper, above = place(histogram, needed)
            uppers.append(upper)
            rests.append(needed - above)
        lowers = [place(histogram, rest)[0] for histogram, rest in zip(count(uppers), rests, strict=True)]
        bits = [(upper << HALF) | lower for upper, lower in zip(uppers, lowers, strict=True)]
        return torch.tensor(bits, dtype=torch.int32, device=self.device).view(torch.float32)


def place(histogram: Tensor, needed: int) -> tuple[int, int]:
    """The bin of the `needed`-th largest entry, and how many lie in larger ones."""
    from_top = histogram.flip(0).cumsum(0)
    at = int((from_top < needed).sum())
    above = int(from_top[at - 1]) if at else 0
    return histogram.shape[0] - 1 - at, above
