"""The sketch of an update by its definition: dense ΔW, hashlib and NumPy, one entry after the other's bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def hashed(side: str, name: str, count: int) -> list[int]:
    """`count` little-endian uint32 of SHAKE-128."""
    raw = hashlib.shake_128(b"loratool-sketch-1\0" + side.encode() + b"\0" + name.encode()).digest(4 * count)
    return [int.from_bytes(raw[4 * at : 4 * at + 4], "little") for at in range(count)]


def sketch(weights: Mapping[str, Matrix], size: int) -> Matrix:
    """s[(h_out(i) + h_in(j)) mod m] += ε_out(i) ε_in(j) ΔW[i, j] over all weights, by name."""
    found = np.zeros(size)
    for name, delta in weights.items():
        rows, columns = hashed("out", name, delta.shape[0]), hashed("in", name, delta.shape[1])
        for i, out in enumerate(rows):
            for j, inside in enumerate(columns):
                sign = (1 - 2 * (out >> 31)) * (1 - 2 * (inside >> 31))
                found[(out % size + inside % size) % size] += sign * delta[i, j]
    return found
