"""A small writer of safetensors files, indexes and adapters, sound ones and malformed ones.

Plain bytes, `struct` and `json`: it shares no code with what it tests. All values are multiples of
1/8 between -1 and 1, so that W + 2·BA is exact in float32 and can be compared bit for bit.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Content = bytes | Callable[[Path], None]  # what lies at a path: bytes, or whatever the function makes there

HIDDEN = 8
MIDDLE = 6  # columns of the second weight, so that it is not square
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.norm.weight"
WEIGHT = f"{QUERY}.weight"
A = f"base_model.model.{QUERY}.lora_A.weight"
B = f"base_model.model.{QUERY}.lora_B.weight"
WEIGHT_BYTES = 4 * HIDDEN * HIDDEN
ENTRY = f'{{"dtype":"F32","shape":[{HIDDEN},{HIDDEN}],"data_offsets":[0,{WEIGHT_BYTES}]}}'

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


def values(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(-8, 9, shape) / 8.0


def f64(array: Array) -> Stored:
    return Stored("F64", array.shape, array.astype("<f8").tobytes())


def f32(array: Array) -> Stored:
    return Stored("F32", array.shape, array.astype("<f4").tobytes())


def f16(array: Array) -> Stored:
    return Stored("F16", array.shape, array.astype("<f2").tobytes())


def bf16(array: Array) -> Stored:
    """Exact for the values made here, whose lower half is zero."""
    halves = array.astype("<f4").view("<u4") >> 16
    return Stored("BF16", array.shape, halves.astype("<u2").tobytes())


W = values(HIDDEN, HIDDEN, seed=1)
W_DOWN = values(HIDDEN, MIDDLE, seed=2)
W_NORM = values(HIDDEN, seed=3)
A_VALUES = values(2, HIDDEN, seed=4)  # (rank, in)
B_VALUES = values(HIDDEN, 2, seed=5)  # (out, rank)
MERGED = W + 2.0 * (B_VALUES @ A_VALUES)  # lora_alpha 4 over r 2

BASE: Mapping[str, Stored] = {WEIGHT: f32(W), f"{DOWN}.weight": f32(W_DOWN), NORM: f32(W_NORM)}
FACTORS: Mapping[str, Stored] = {A: f32(A_VALUES), B: f32(B_VALUES)}
CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def frame(header: bytes | str, data: bytes = bytes(WEIGHT_BYTES), length: int | None = None) -> bytes:
    """A file with this header, sound or not; `length` is what the first eight bytes claim."""
    head = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def one_weight(data: bytes = W.astype("<f4").tobytes(), **changed: object) -> bytes:
    """The base's file with its first weight alone, in which some fields of the header may be `changed`."""
    entry = {"dtype": "F32", "shape": [HIDDEN, HIDDEN], "data_offsets": [0, WEIGHT_BYTES], **changed}
    return frame(json.dumps({WEIGHT: entry}), data)


def described(*entries: tuple[str, str, list[int], int, int], data: int) -> bytes:
    """A file of (name, dtype, shape, start, stop) entries, with `data` bytes after its header."""
    table = {n: {"dtype": d, "shape": s, "data_offsets": [start, stop]} for n, d, s, start, stop in entries}
    return frame(json.dumps(table), bytes(data))


def safetensors_bytes(tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """A sound file."""
    table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, stored in tensors.items():
        table[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, at + len(stored.raw)]}
        at += len(stored.raw)
    header = json.dumps(table).encode()
    return frame(header + b" " * (-len(header) % 8), b"".join(stored.raw for stored in tensors.values()))


def put(path: Path, content: Content) -> None:
    """Make `content` what lies at `path`, whatever was there."""
    if os.path.lexists(path):
        path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def write_json(path: Path, table: object) -> None:
    path.write_text(json.dumps(table))


def write_base(folder: Path, tensors: Mapping[str, Stored] = BASE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (folder / MODEL).write_bytes(safetensors_bytes(tensors))


def write_sharded(folder: Path, where: Mapping[str, str] | None = None, **index: object) -> None:
    """The base in two shards with an index: the first weight in the first, all else in the second.

    `where` is the index's weight map, the true one by default; `index` replaces its other fields.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).unlink(missing_ok=True)
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    first = {WEIGHT: BASE[WEIGHT]}
    second = {name: stored for name, stored in BASE.items() if name != WEIGHT}
    for name, tensors in zip(SHARDS, (first, second), strict=True):
        (folder / name).write_bytes(safetensors_bytes(tensors))
    table = {"metadata": {"total_size": total_size(BASE)}, "weight_map": dict(where or weight_map()), **index}
    write_json(folder / INDEX, table)


def weight_map() -> dict[str, str]:
    return {name: SHARDS[0] if name == WEIGHT else SHARDS[1] for name in BASE}


def total_size(tensors: Mapping[str, Stored]) -> int:
    return sum(len(stored.raw) for stored in tensors.values())


def write_adapter(folder: Path, tensors: Mapping[str, Stored] = FACTORS, /, **config: object) -> None:
    """An adapter of rank 2 on the first weight; `config` changes fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER).write_bytes(safetensors_bytes(tensors))
    write_json(folder / ADAPTER_CONFIG, {**CONFIG, **config})


class Trap:
    """Unpickling this makes the folder `path`: the proof that code of an input was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickled_trap(path: Path, protocol: int) -> bytes:
    return pickle.dumps(Trap(path), protocol)


def random(*shape: int, seed: int = 0) -> Array:
    """Other values for every shape."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)
