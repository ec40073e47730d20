"""W_tuned − W_base of one matrix, read some rows at a time; and the leading part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from loratool.adapters.adapter import same_bytes
from loratool.adapters.writer import torch_dtype
from loratool.algebra.lowrank.products import Decomposition, negligible
from loratool.algebra.lowrank.sketching import Rows, sketch
from loratool.bases.packed import Packed
from loratool.bases.weights import Held, Plain, Room, StoredWeight
from loratool.files.open_sources import OpenSources
from loratool.files.safefile import FLOAT_NAMES
from loratool.lazy import Tensor, torch

EDGE = 1.02  # noise of that size reaches σ = √d + √k; a little more keeps it out
ITERATIONS = 2  # of the power method; more of them where the spectrum is flat
MOST_ITERATIONS = 8
SMALL = 256  # up to this many rows or columns a full decomposition is as fast as a sketch
TILE = 8 << 20  # bytes of a difference that are worked on at a time
HELD = 512 << 20  # bytes of differences that stay in memory; larger ones are read again for every pass
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}  # bits
COMPARED_AT_ONCE = 1 << 20  # values


@dataclass(frozen=True)
class Rule:
    """How many singular values a layer keeps."""

    most: int
    noise: bool  # only those above the noise
    energy: float | None

    @classmethod
    def of(cls, rank: int | str | None, energy: float | None, max_rank: int) -> Rule:
        """The rule that was asked for."""
        if isinstance(rank, int):
            return cls(rank, False, energy)
        return cls(max_rank, rank == "auto" or energy is None, energy)

    @property
    def by_value(self) -> bool:
        """Whether ranks depend on what differs."""
        return self.noise or self.energy is not None

    def choose(self, parts: Sequence[Part], limit: int) -> int:
        """The rank of a layer, from what is known of its matrices: one, or one an expert."""
        rank = limit
        if self.noise:
            rank = min(rank, max(part.above_noise for part in parts))
        if self.energy is not None:
            wanted = self.energy * math.fsum(part.squared for part in parts) * (1 - 1e-12)
            kept = [math.fsum(part.energies[at] for part in parts) for at in range(limit)]
            rank = min(rank, next((at for at in range(limit) if math.fsum(kept[:at]) >= wanted), limit))
        return rank

    @property
    def told(self) -> str:
        """The rule in words."""
        said = [f"above the noise, at most {self.most}" if self.noise else f"rank {self.most}"]
        if self.energy is not None and not self.noise:
            said = [f"at most {self.most}"]
        return ", ".join([*([f"energy {self.energy:g}"] if self.energy is not None else []), *said])


class NotFiniteError(Exception):
    """A tile of a difference contains NaN or infinity."""


@dataclass
class Difference:
    """W_tuned − W_base of one matrix, seen some rows at a time. The first pass measures, and keeps what is small."""

    base: StoredWeight
    tuned: StoredWeight
    device: torch.device
    room: int  # bytes of it in float32 that may stay in memory
    shared: tuple[Held, Held] = field(default_factory=lambda: (Held(), Held()))  # of the two weights, for all matrices
    weight: float = 0.0  # ‖W_base‖²
    row_steps: Tensor = field(init=False)  # (rows,) Σ ulp² of W_tuned in the coarser of the two dtypes, in float64
    column_steps: Tensor = field(init=False)  # (columns,) the same
    held: Tensor | None = None
    measured: bool = False

    def __post_init__(self) -> None:
        self.row_steps, self.column_steps = (
            torch.zeros(size, dtype=torch.float64, device=self.device) for size in self.shape
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape[0], math.prod(self.base.shape[1:])

    @property
    def step(self) -> int:
        """Rows of a tile."""
        return max(1, TILE // (self.dtype.itemsize * self.shape[1]))

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        if self.held is None:
            hold = not self.measured and self.dtype.itemsize * self.shape[0] * self.shape[1] <= self.room
            rows = self.shape[0] if hold else min(self.step, self.shape[0])
            place = torch.empty(rows, self.shape[1], dtype=self.dtype, device=self.device)
            yield from self.read(place)
            self.measured = True
            self.held = place if hold else None
            return
        for first in range(0, self.shape[0], self.step):
            yield first, self.held[first : first + self.step]

    @property
    def coarser(self) -> str:
        """The dtype of the two with the larger rounding; decoded values are rounded to float32."""
        return min((self.base.exact, self.tuned.exact), key=MANTISSA.__getitem__)

    @property
    def dtype(self) -> torch.dtype:
        """That of the difference, whose own rounding has to be far below that of the stored values."""
        return torch.float64 if "F64" in (self.base.exact, self.tuned.exact) or self.coarser == "F32" else torch.float32

    def read(self, place: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The tiles, from the files: one after the other into `place`, or one over the other where that is smaller."""
        rows, columns = self.shape
        pair = (self.base, self.tuned)
        most = min(self.step, rows) * columns
        dtypes = [torch_dtype(weight.exact) for weight in pair]
        with OpenSources() as sources:
            rooms = [
                Room(sources, torch.empty(most * dtype.itemsize, dtype=torch.uint8), held=held)
                for dtype, held in zip(dtypes, self.shared, strict=True)
            ]
            for first in range(0, rows, self.step):
                count = min(self.step, rows - first)
                before, after = (
                    weight.rows(first, count, self.device, dtype, room)
                    for weight, dtype, room in zip(pair, dtypes, rooms, strict=True)
                )
                tile = place[first : first + count] if place.shape[0] == rows else place[:count]
                tile.copy_(after)
                if not self.measured:
                    self.measure(first, before, tile)
                yield first, tile.sub_(before)

    def measure(self, first: int, before: Tensor, after: Tensor) -> None:
        """Account for some rows, from `first` on; raises `NotFiniteError` for those that hold what is no number."""
        for tile in (before, after):
            if not all(bool(value.isfinite()) for value in torch.aminmax(tile)):
                raise NotFiniteError
        self.weight += float(torch.linalg.vector_norm(before, dtype=self.dtype)) ** 2
        squares = powers_of(after).clamp_min_(torch.finfo(torch_dtype(self.coarser)).tiny).square_()
        scale = 4.0 ** -MANTISSA[self.coarser]
        self.row_steps[first : first + after.shape[0]] = squares.sum(1) * scale
        self.column_steps += squares.sum(0) * scale

    def edges(self, found: Decomposition) -> Tensor:
        """What rounding alone can make of each singular value, in float64.

        A matrix of independent numbers with deviation s has singular values up to s √columns + s √rows. Where the
        deviations differ, those that count are the ones of the rows and columns in which the singular vectors lie.
        """
        along = found.left.double().square().T @ (self.row_steps / 12)
        across = found.right.double().square() @ (self.column_steps / 12)
        return EDGE * (along.sqrt() + across.sqrt())


def powers_of(values: Tensor) -> Tensor:
    """2^exponent of each value, in float64; 0 of zeros and subnormal numbers."""
    bits, mask = (torch.int64, 0x7FF0_0000_0000_0000) if values.dtype == torch.float64 else (torch.int32, 0x7F80_0000)
    return (values.view(bits) & mask).view(values.dtype).double()


@dataclass(frozen=True)
class Part:
    """One matrix, decomposed as far as is needed."""

    found: Decomposition
    energies: list[float]  # squares of singular values, in falling order; all there are where `complete`
    squared: float  # ‖M‖²
    complete: bool
    above_noise: int = 0
    weight: float = 0.0  # ‖W_base‖²

    def lost(self, rank: int) -> float:
        """‖M − M_k‖²."""
        if self.complete:
            return math.fsum(self.energies[rank:])
        return max(0.0, self.squared - math.fsum(self.energies[:rank]))


def decomposed(matrix: Difference, limit: int, exact: bool, seed: int) -> Part:
    """The leading singular values and vectors: by a sketch, or in full where that is as fast or asked for."""
    part = leading(matrix, limit, exact, seed)
    return replace(part, above_noise=above_noise(part.found, matrix.edges(part.found)), weight=matrix.weight)


def leading(matrix: Rows, limit: int, exact: bool, seed: int) -> Part:
    """The same of any matrix, of which neither noise nor a base is known."""
    smaller = min(matrix.shape)
    if exact or smaller <= SMALL or 4 * limit > smaller:
        found, squared = in_full(matrix)
    else:
        sketched = sketch(matrix, limit, max(8, limit), ITERATIONS, seed, MOST_ITERATIONS)
        found, squared = sketched.found, sketched.squared
    if not math.isfinite(squared):
        raise NotFiniteError
    complete = found.values.shape[0] == smaller
    return Part(found.truncated(limit), found.values.double().square().tolist(), squared, complete)


def above_noise(found: Decomposition, edges: Tensor) -> int:
    """How many of the leading singular values there are up to the last that exceeds what rounding can make.

    What the decomposition itself rounds, which is relative to the largest, does not count either.
    """
    values = found.values.double()
    above = (values > edges) & (values > negligible(values) * values[:1])
    return int(above.nonzero().max()) + 1 if bool(above.any()) else 0


def in_full(matrix: Rows) -> tuple[Decomposition, float]:
    """All singular values and vectors in float64, and ‖M‖². Of a tall matrix only the triangle of its QR is formed."""
    rows, columns = matrix.shape
    if rows < 4 * columns:
        dense = torch.empty(rows, columns, dtype=torch.float64, device=matrix.device)
        for first, tile in matrix.tiles():
            dense[first : first + tile.shape[0]] = tile
        found = Decomposition(*torch.linalg.svd(dense, full_matrices=False))
    else:
        triangle = torch.empty(0, columns, dtype=torch.float64, device=matrix.device)
        for _, tile in matrix.tiles():
            triangle = torch.linalg.qr(torch.cat([triangle, tile.double()]), mode="r").R
        _, values, right = torch.linalg.svd(triangle, full_matrices=False)
        there = values > negligible(values) * values[:1]  # of a null direction, left vectors would be rounding
        across = (right * (there / torch.where(there, values, 1.0))[:, None]).T
        found = Decomposition(torch.cat([tile.double() @ across for _, tile in matrix.tiles()]), values, right)
    return found, float(found.values.square().sum())


def same_values(one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two weights of one shape hold the same values; the same bytes, where they are plain and of one dtype."""
    if isinstance(one, Plain) and isinstance(other, Plain) and one.dtype == other.dtype:
        return same_bytes(one, other)
    if not {one.exact, other.exact} <= set(FLOAT_NAMES):
        return False
    if packed_alike(one, other):
        return True
    wide = torch.promote_types(torch_dtype(one.exact), torch_dtype(other.exact))
    return all(torch.equal(a, b) for a, b in zip(pieces(one, wide), pieces(other, wide), strict=True))


def packed_alike(one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two weights are packed in the same way to the same bytes."""
    return (
        isinstance(one, Packed)
        and isinstance(other, Packed)
        and (one.scheme, len(one.tensors)) == (other.scheme, len(other.tensors))
        and all(map(same_bytes, one.tensors, other.tensors))
    )


def is_finite(weight: StoredWeight) -> bool:
    """Whether no value is NaN or infinite."""
    if isinstance(weight, Plain):
        return weight.finite()
    return all(bool(piece.isfinite().all()) for piece in pieces(weight, torch_dtype(weight.exact)))


def pieces(weight: StoredWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of a weight in the order in which they lie, some rows at a time."""
    step = max(1, COMPARED_AT_ONCE // max(1, math.prod(weight.shape[1:])))
    count = math.prod(weight.shape[:1])
    with OpenSources() as sources:
        room = Room(sources)
        for first in range(0, count, step):
            yield weight.rows(first, min(step, count - first), torch.device("cpu"), dtype, room)
