"""Weights as bitsandbytes packs them, written and decoded one element at a time from its documented layout."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quantised_models import Quantised, Weights

Array = NDArray[Any]


@dataclass(frozen=True)
class FourBit:
    """Random packed values with random statistics."""

    shape: tuple[int, ...]
    kind: str
    block: int
    nested: int  # statistics that share one of theirs; 0 for none
    seed: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def tensors(self, name: str) -> dict[str, Array]:
        """Those of a checkpoint, by name."""
        numbers = np.random.default_rng(self.seed)
        blocks = -(-self.elements // self.block)
        said: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.block, "dtype": "bfloat16"}
        said["shape"] = list(self.shape)
        found: dict[str, Array] = {
            name: numbers.integers(0, 256, ((self.elements + 1) // 2, 1), np.uint8),
            f"{name}.quant_map": numbers.standard_normal(16, np.float32),
            f"{name}.absmax": numbers.random(blocks, np.float32),
        }
        if self.elements % 2:
            found[name][-1] &= 0xF0  # the last byte has one value
        if self.nested:
            said |= {
                "nested_blocksize": self.nested,
                "nested_dtype": "float32",
                "nested_offset": 0.1 + numbers.random(),
            }
            found[f"{name}.absmax"] = numbers.integers(0, 256, blocks, np.uint8)
            found[f"{name}.nested_absmax"] = numbers.random(-(-blocks // self.nested), np.float32)
            found[f"{name}.nested_quant_map"] = numbers.standard_normal(256, np.float32)
        found[f"{name}.quant_state.bitsandbytes__{self.kind}"] = as_bytes(said)
        return found

    def values(self, name: str = "") -> Array:
        """What they mean, in float32, element by element."""
        stored = self.tensors(name)
        decoded = np.empty(self.elements, np.float32)
        for i in range(self.elements):
            byte = int(stored[name].flat[i // 2])
            nibble = byte % 16 if i % 2 else byte // 16
            decoded[i] = stored[f"{name}.quant_map"][nibble] * self.absmax(stored, name, i // self.block)
        return decoded.reshape(self.shape)

    def absmax(self, stored: dict[str, Array], name: str, block: int) -> Any:
        if not self.nested:
            return stored[f"{name}.absmax"][block]
        said = json.loads(stored[f"{name}.quant_state.bitsandbytes__{self.kind}"].tobytes())
        scaled = stored[f"{name}.nested_quant_map"][stored[f"{name}.absmax"][block]]
        scaled = scaled * stored[f"{name}.nested_absmax"][block // self.nested]
        return scaled + np.float32(said["nested_offset"])


def as_bytes(said: object) -> Array:
    """JSON as a tensor."""
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def int8(shape: tuple[int, int], module: str, seed: int = 0) -> tuple[dict[str, Array], Array]:
    """Random tensors of an int8 module, and what they mean in float32."""
    numbers = np.random.default_rng(seed)
    values = numbers.integers(-127, 128, shape, np.int8)
    largest = numbers.random(shape[0], np.float32)
    decoded = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            decoded[row, column] = np.float32(values[row, column]) * largest[row] * np.float32(1 / 127)
    return {
        f"{module}.weight": values,
        f"{module}.SCB": largest,
        f"{module}.weight_format": np.array(0, np.uint8),
    }, decoded


def int8_of(weights: Weights) -> Quantised:
    """Each value put to the nearest of 255 steps of its row."""
    made = Quantised({"quant_method": "bitsandbytes", "load_in_8bit": True})
    for name, weight in weights.items():
        values = weight.float().numpy()
        largest: Array = np.abs(values).max(1)
        codes = np.rint(values * (np.float32(127) / largest[:, None])).astype(np.int8)
        decoded = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
        made.add(name, decoded, _=codes, SCB=largest, weight_format=np.array(0, np.uint8))
    return made


# The 16 values of NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(weights: Weights, block: int = 64) -> Quantised:
    """Each value put to the nearest of NF4, times the largest magnitude of its block."""
    made = Quantised({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    levels = np.array(NF4, np.float32)
    for name, weight in weights.items():
        values = weight.float().numpy()
        flat = np.pad(values.reshape(-1), (0, -values.size % block)).reshape(-1, block)
        absmax = np.abs(flat).max(1)
        share = flat / np.maximum(absmax, np.float32(2.0**-20))[:, None]
        codes = np.abs(share[..., None] - levels).argmin(-1).astype(np.uint8)
        decoded = (levels[codes] * absmax[:, None]).reshape(-1)[: values.size].reshape(values.shape)
        codes = codes.reshape(-1)[: values.size + values.size % 2]
        said = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(values.shape)}
        made.values[name] = torch.from_numpy(decoded)
        made.tensors |= {
            name: torch.from_numpy((codes[::2] << 4 | codes[1::2])[:, None].copy()),
            f"{name}.quant_map": torch.from_numpy(levels.copy()),
            f"{name}.absmax": torch.from_numpy(absmax.copy()),
            f"{name}.quant_state.bitsandbytes__nf4": torch.from_numpy(as_bytes(said).copy()),
        }
    return made
