"""A few hundred numbers that stand for an update: their Euclidean distances estimate those of the updates.

TensorSketch (Pagh, "Compressed matrix multiplication", ACM TOCT 2013; Pham and Pagh, KDD 2013) of all weights together:

    s[(h_out(i) + h_in(j)) mod m] += ε_out(i) ε_in(j) ΔW[i, j]        of every weight, m a power of 2

Bucket h and sign ε of a row or column come from SHAKE-128, so they are the same on every machine and with every library. Of a
product up @ down the sums over i and j come apart: with C, which adds signed rows into buckets, the sketch is the cyclic
convolution of C_out up and C_in downᵀ, component by component. Transforms of all components and of all weights are added
before one inverse transform, so a sketch costs O(r (d + k + m log m)), and no product is formed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from loratool.lazy import NDArray, numpy as np

Side = Literal["out", "in"]

VERSION = "loratool-sketch-1"  # goes into every hash: another rule would be another version
SIZE = 1024  # numbers of a sketch as it is computed, and as an index keeps it
SHORT = 256  # numbers of one that is shown
REMEMBERED = 2048  # hashes of sides: adapters of one base have the same ones


@lru_cache(maxsize=REMEMBERED)
def hashes(side: Side, name: str, count: int) -> NDArray[Any]:
    """One number for each row (`out`) or column (`in`) of a weight, as uint32, (count,)."""
    text = f"{VERSION}\0{side}\0{name}".encode("utf-8", "surrogatepass")
    return np.frombuffer(hashlib.shake_128(text).digest(4 * count), dtype="<u4")


def buckets(side: Side, name: str, values: NDArray[Any], size: int, first: int = 0) -> NDArray[Any]:
    """Signed sums of rows by their buckets, transposed: rows `first` … `first + n` of a side, (n, rank) → (rank, size)."""
    found = hashes(side, name, first + values.shape[0])[first:]
    rank = values.shape[1]
    signed = (values * (1.0 - 2.0 * (found >> np.uint32(31)))[:, None]).T
    places = np.arange(rank)[:, None] * size + (found & np.uint32(size - 1)).astype(np.int64)
    return np.bincount(places.ravel(), signed.ravel(), rank * size).reshape(rank, size)


class Sketcher:
    """The sum of the sketches of some products."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.transform: NDArray[Any] = np.zeros(size // 2 + 1, dtype=np.complex128)

    def add(self, name: str, up: NDArray[Any], down: NDArray[Any], first: int = 0) -> None:
        """Take in up @ down, (out, rank) and (rank, in) in float64, as rows `first` … `first + out` of the weight `name`."""
        rows = np.fft.rfft(buckets("out", name, up, self.size, first))
        columns = np.fft.rfft(buckets("in", name, down.T, self.size))
        self.transform += (rows * columns).sum(0)

    def sketch(self) -> NDArray[Any]:
        """The sketch of all that was added, float64, (size,)."""
        found: NDArray[Any] = np.fft.irfft(self.transform, self.size)
        return found


def squared_norm(up: NDArray[Any], down: NDArray[Any]) -> float:
    """‖up @ down‖², Frobenius: the sum over (upᵀ up) ∘ (down downᵀ)."""
    with np.errstate(all="ignore"):  # of values that are not finite
        total = float(((up.T @ up) * (down @ down.T)).sum())
    return 0.0 if total < 0 else total


def folded(sketch: NDArray[Any], size: int = SHORT) -> NDArray[Any]:
    """The sketch of fewer numbers, (..., m) → (..., size), exactly: buckets are the last bits of a hash."""
    short: NDArray[Any] = sketch.reshape(*sketch.shape[:-1], -1, size).sum(-2)
    return short


def spread(size: int) -> float:
    """How far an estimated distance is from the true one, relative to it: the largest root mean square, √(8/m)/2.

    That is of updates which differ in one module by a rank of 1; of those that differ in many it is half as much.
    """
    return math.sqrt(8 / size) / 2


def tolerance(norms: Iterable[float], roundings: Iterable[float]) -> float:
    """The distance up to which two updates are the same: 1.5 √(u₁² + u₂²) ‖ΔW‖, u the rounding of their stored factors."""
    return 1.5 * math.hypot(*roundings) * max(norms)
