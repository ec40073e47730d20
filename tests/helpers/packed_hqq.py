"""Weights as HQQ packs them, written and decoded one element at a time from its documented layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quantised_models import Quantised, Weights

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
        values, scale, zero = self.drawn()
        parts = {"W_q": words_of(values, self.packing), "scale": scale, "zero": zero}
        return {f"{module}.{key}": value for key, value in {**parts, **self.said()}.items()}

    def said(self) -> dict[str, Array]:
        """The tensors that say how a module is packed, by the last part of their names."""
        numbers = {"nbits": WORDS[self.packing][0], "group_size": self.group, "axis": self.axis}
        flags = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero")
        return {
            "shape": np.array(self.shape, np.int64),
            "packing": np.frombuffer(self.packing.encode(), np.uint8),
            "compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
            **{key: np.array(value, np.int32) for key, value in numbers.items()},
            **{key: np.array(0, np.uint8) for key in flags},
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


def words_of(values: Array, packing: str) -> Array:
    """The words that hold unsigned values, (rows, columns) as they are grouped."""
    bits, count, dtype, first = WORDS[packing]
    rows = -(-len(values) // count)  # of words; the last ones are padded with zeros
    words = np.zeros((rows, values.shape[1]), np.int64)
    for row, each in enumerate(values):
        words[row % rows] += each << (first - bits * (row // rows))
    return words.astype(dtype)


def hqq(weights: Weights, packing: str, group: int, axis: int) -> Quantised:
    """Each value put to the nearest of the steps from the least to the largest one of its group."""
    made, most = Quantised({"quant_method": "hqq", "skip_modules": ["lm_head"]}), 2 ** WORDS[packing][0] - 1
    for name, weight in weights.items():
        layout = Hqq((weight.shape[0], weight.shape[1]), packing, group, axis)
        values = weight.float().numpy().reshape(layout.grouped)
        low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
        scale = ((high - low) / np.float32(most)).astype(np.float16)
        zero = (-low / scale.astype(np.float32)).astype(np.float16)
        zero = np.rint(zero) if most == 15 else zero  # as hqq does for 4 bits
        steps, zeros = scale.astype(np.float32), zero.astype(np.float32)
        codes = np.clip(np.rint(values / steps + zeros), 0, most).astype(np.int64)
        decoded = ((codes.astype(np.float32) - zeros) * steps).reshape(weight.shape)
        made.add(name, decoded, W_q=words_of(codes, packing), scale=scale, zero=zero, **layout.said())
    return made
