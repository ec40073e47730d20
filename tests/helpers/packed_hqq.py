"""Weights as HQQ packs them, written and decoded one element at a time from its documented layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# packing → bits of a value, values of a word, dtype of a word, where the first value begins
WORDS: dict[str, tuple[int, int, type, int]] = {
    "8bit_u8": (8, 1, np.uint8, 0),
    "4bit_u8": (4, 2, np.uint8, 4),
    "3bit_32": (3, 10, np.int32, 27),
    "2bit_u8": (2, 4, np.uint8, 6),
    "1bit_u8": (1, 8, np.uint8, 7),
}


@dataclass(frozen=True)
class Hqq:
    """A random matrix, packed."""

    shape: tuple[int, int]
    packing: str
    group: int
    axis: int
    seed: int = 0

    @property
    def grouped(self) -> tuple[int, int]:
        """The shape in which values are grouped: groups are columns where the axis is 0, else rows."""
        groups = math.prod(self.shape) // self.group
        return (self.group, groups) if self.axis == 0 else (groups, self.group)

    def drawn(self) -> tuple[Array, Array, Array]:
        """Unsigned values as they are grouped, scales and zeros."""
        numbers = np.random.default_rng(self.seed)
        of_groups = (1, self.grouped[1]) if self.axis == 0 else (self.grouped[0], 1)
        scale, zero = (numbers.random(of_groups, np.float32).astype(np.float16) for _ in range(2))
        return numbers.integers(0, 2 ** WORDS[self.packing][0], self.grouped), scale, zero

    def tensors(self, module: str) -> dict[str, Array]:
        """Those of a checkpoint, by name."""
        bits, count, dtype, first = WORDS[self.packing]
        values, scale, zero = self.drawn()
        rows = -(-self.grouped[0] // count)  # of words; the last ones are filled up with zeros
        words = np.zeros((rows, self.grouped[1]), np.int64)
        for row in range(self.grouped[0]):
            for column in range(self.grouped[1]):
                words[row % rows, column] += values[row, column] << (first - bits * (row // rows))
        numbers = {"nbits": bits, "group_size": self.group, "axis": self.axis}
        flags = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero")
        return {
            f"{module}.W_q": words.astype(dtype),
            f"{module}.scale": scale,
            f"{module}.zero": zero,
            f"{module}.shape": np.array(self.shape, np.int64),
            f"{module}.packing": np.frombuffer(self.packing.encode(), np.uint8),
            f"{module}.compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
            **{f"{module}.{key}": np.array(value, np.int32) for key, value in numbers.items()},
            **{f"{module}.{key}": np.array(0, np.uint8) for key in flags},
        }

    def values(self) -> Array:
        """What they mean, in float32, element by element."""
        values, scale, zero = self.drawn()
        decoded = np.empty(self.grouped, np.float32)
        for row in range(self.grouped[0]):
            for column in range(self.grouped[1]):
                at = (0, column) if self.axis == 0 else (row, 0)
                decoded[row, column] = (np.float32(values[row, column]) - np.float32(zero[at])) * np.float32(scale[at])
        return decoded.reshape(self.shape)
