"""Weights as GPTQ and AWQ pack them, written and decoded one element at a time from the documented layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight in a word, from the lowest four bits on


@dataclass(frozen=True)
class Grouped:
    """Random integers with random zero points and scales, of one module."""

    outputs: int
    inputs: int
    bits: int = 4
    group: int = -1
    shuffled: bool = False  # groups in no order, as act-order leaves them
    lowest_zero: int = 1
    scales: Any = np.float16
    seed: int = 0

    @property
    def groups(self) -> int:
        return 1 if self.group == -1 else -(-self.inputs // self.group)

    @property
    def group_of(self) -> Array:
        """(inputs,)"""
        size = self.inputs if self.group == -1 else self.group
        found = np.arange(self.inputs, dtype=np.int32) // size
        return np.random.default_rng(self.seed + 1).permutation(found) if self.shuffled else found

    @property
    def drawn(self) -> tuple[Array, Array, Array]:
        """Integers (outputs, inputs), zero points (groups, outputs) and scales (groups, outputs)."""
        numbers = np.random.default_rng(self.seed)
        integers = numbers.integers(0, 2**self.bits, (self.outputs, self.inputs))
        zeros = numbers.integers(self.lowest_zero, 2**self.bits, (self.groups, self.outputs))
        scales = (numbers.random((self.groups, self.outputs)) * 0.01 + 0.001).astype(self.scales)
        return integers, zeros, scales

    def values(self) -> Array:
        """What they mean, in float32, element by element."""
        integers, zeros, scales = self.drawn
        decoded = np.empty((self.outputs, self.inputs), np.float32)
        for o in range(self.outputs):
            for i, g in enumerate(self.group_of):
                decoded[o, i] = np.float32(scales[g, o]) * np.float32(integers[o, i] - zeros[g, o])
        return decoded

    def packed_integers(self, integers: Array, awq: bool) -> Array:
        """(outputs, inputs) of integers in the layout of GPTQ's or AWQ's `qweight`."""
        if awq:
            return np.stack([by_eight(column) for column in integers.T])
        return np.stack([stream(row, self.bits) for row in integers], 1)

    def gptq(self, module: str, less: int = 1, order: bool = True) -> dict[str, Array]:
        """Its tensors in GPTQ's layout; zero points are stored less so much."""
        integers, zeros, scales = self.drawn
        found = {
            f"{module}.qweight": self.packed_integers(integers, awq=False),
            f"{module}.qzeros": np.stack([stream(row - less, self.bits) for row in zeros]),
            f"{module}.scales": scales,
        }
        return {**found, **({f"{module}.g_idx": self.group_of} if order else {})}

    def awq(self, module: str) -> dict[str, Array]:
        """Its tensors in AWQ's layout gemm."""
        integers, zeros, scales = self.drawn
        return {
            f"{module}.qweight": self.packed_integers(integers, awq=True),
            f"{module}.qzeros": np.stack([by_eight(row) for row in zeros]),
            f"{module}.scales": scales,
        }


def stream(integers: Iterable[int], bits: int) -> Array:
    """Integers one after the other in words of 32 bits, lowest bits first, each modulo 2^bits."""
    number, place = 0, 0
    for integer in integers:
        number |= (int(integer) % 2**bits) << place
        place += bits
    words = [(number >> (32 * w)) % 2**32 for w in range(-(-place // 32))]
    return np.array(words, np.uint32).view(np.int32)


def by_eight(integers: Array) -> Array:
    """Integers of four bits, eight in a word in AWQ's order."""
    eights = [integers[start : start + 8] for start in range(0, len(integers), 8)]
    words = [sum(int(eight[output]) << 4 * n for n, output in enumerate(AWQ_OUTPUTS)) for eight in eights]
    return np.array(words, np.uint32).view(np.int32)


def field_of(words: Iterable[int], index: int, bits: int) -> int:
    """One integer out of a stream of words."""
    number: int = sum((int(word) % 2**32) << 32 * w for w, word in enumerate(words))
    return int((number >> (index * bits)) % 2**bits)


def gptq_values(stored: Mapping[str, Array], module: str, bits: int, version: int = 1) -> Array:
    """The float32 values of a module in GPTQ's layout, element by element; no stored zero point may be all ones."""
    words, zeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    groups = stored[f"{module}.g_idx"]
    decoded = np.empty((words.shape[1], len(groups)), np.float32)
    for o in range(decoded.shape[0]):
        for i, g in enumerate(groups):
            zero = field_of(zeros[g], o, bits) + (2 - version)
            decoded[o, i] = np.float32(scales[g, o]) * np.float32(field_of(words[:, o], i, bits) - zero)
    return decoded


def awq_values(stored: Mapping[str, Array], module: str, group: int) -> Array:
    """The float32 values of a module in AWQ's layout, element by element."""
    words, zeros, scales = (stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    decoded = np.empty((8 * words.shape[1], words.shape[0]), np.float32)
    for o in range(decoded.shape[0]):
        place = 4 * AWQ_OUTPUTS.index(o % 8)
        for i in range(decoded.shape[1]):
            g = 0 if group == -1 else i // group
            q, z = (int(w) >> place & 15 for w in (words[i, o // 8], zeros[g, o // 8]))
            decoded[o, i] = np.float32(scales[g, o]) * np.float32(q - z)
    return decoded
