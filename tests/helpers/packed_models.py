"""Small checkpoints with packed weights, written from arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint
from loratool.bases.packed import Packed
from loratool.bases.weights import Memory, Room
from loratool.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def save_packed(
    folder: Path,
    tensors: Mapping[str, NDArray[Any] | torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    metadata: dict[str, str] | None = None,
    **config: object,
) -> Path:
    """A model folder with one file of weights, whose values are written as they are."""
    folder.mkdir(parents=True)
    as_tensors = {n: v for n, v in tensors.items() if isinstance(v, torch.Tensor)}
    arrays = {n: v.copy() for n, v in tensors.items() if not isinstance(v, torch.Tensor)}
    if as_tensors:
        as_tensors |= {name: torch.from_numpy(values) for name, values in arrays.items()}
        save_file(as_tensors, folder / "model.safetensors", metadata)
    else:  # older safetensors writes unsigned words of numpy's alone
        save_arrays(arrays, folder / "model.safetensors", metadata)
    table = {"model_type": "llama", "dtype": "bfloat16", **config}
    if quantization_config is not None:
        table["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def open_packed(folder: Path) -> Decoded:
    """The checkpoint with its packed weights seen as plain ones."""
    found = decoded(open_checkpoint(folder))
    assert isinstance(found, Decoded)
    return found


def check_rows(folder: Path, name: str, wanted: NDArray[Any]) -> None:
    """Some rows from anywhere are those of the definition, with a buffer and without, on a GPU too where there is one."""
    weight = open_packed(folder).weights[name]
    assert weight.shape == wanted.shape
    flat = torch.from_numpy(wanted.reshape(len(wanted), -1))
    for first, count in ((0, len(wanted)), (0, 1), (1, 1), (len(wanted) - 2, 2), (len(wanted) // 3, len(wanted) // 2)):
        for device in DEVICES:
            room = room_on(device, flat.numel() + 1)
            found = weight.rows(first, count, device, torch.float32, room).cpu()
            assert torch.equal(found, flat[first : first + count])
            room.sources.close()
        assert torch.equal(weight.rows(first, count, CPU, torch.float64, Room()), flat[first : first + count].double())
    assert weight.check(Room()) == ""
    check_numpy(weight, wanted)


def check_numpy(weight: Packed, wanted: NDArray[Any]) -> None:
    """Some rows from anywhere are the same by numpy, where it reads the weight: the bits that torch gives, signs of 0 too."""
    if weight.by_numpy:
        memory, flat = Memory(), wanted.reshape(-1, weight.line)
        for first in range(0, len(flat), max(1, len(flat) // 3)):
            found = np.full((min(5, len(flat) - first), weight.line), np.nan, np.float32)
            weight.decode_into(found, first, memory)
            assert np.array_equal(found, flat[first : first + 5])
            by_torch = weight.decode(first, len(found), CPU, Room()).numpy()
            assert np.array_equal(found.view(np.int32), by_torch.view(np.int32))
        memory.sources.close()


def room_on(device: torch.device, size: int) -> Room:
    """Buffers of so many bytes as a worker has them."""
    on_gpu = device.type == "cuda"
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    return Room(host=host, twin=torch.empty_like(host, device=device) if on_gpu else None)


def refusal(folder: Path) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        decoded(open_checkpoint(folder))
    return str(caught.value)
