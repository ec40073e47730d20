"""Checkpoints written by hand, and changes of a known rank planted in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.algebra.lowrank.products import Product

if TYPE_CHECKING:
    from numpy.typing import NDArray


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(weight: Tensor, rank: int, seed: int = 0, size: float = 0.05) -> Tensor:
    """A random matrix of a rank, in the shape of a weight, with entries of about `size`."""
    shape = weight.shape if weight.dim() == 2 else (weight.shape[0], weight[0].numel())
    up = torch.randn(shape[0], rank, generator=seeded(seed), dtype=torch.float64)
    down = torch.randn(rank, shape[1], generator=seeded(seed + 1), dtype=torch.float64)
    found: Tensor = (up @ down * (size / rank**0.5)).reshape(weight.shape)
    return found


def save_model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, files: int = 1
) -> Path:
    """A checkpoint of some files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    for number in range(files):
        mine = {name: tensors[name].contiguous().clone() for name in names[number::files]}
        name = f"model-{number + 1:05d}-of-{files:05d}" if files > 1 else "model"
        save_file(mine, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    return folder


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def draw(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=seeded(seed), dtype=torch.float64)


def written_out(products: Sequence[Product]) -> list[NDArray[np.float64]]:
    return [np.asarray(p.up.double() @ p.down.double()) for p in products]
