"""A small adapter that has something to show: its updates grow from layer to layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS, RANK = 12, 4


def write_adapter(
    folder: Path, layers: int = LAYERS, names: Sequence[str] = NAMES, seed: int = 0, **config: Any
) -> Path:
    """A small adapter whose updates grow from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for at, name in enumerate(names):
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(24, RANK, generator=generator) * (1 + layer + 3 * at)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "some/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def delta(folder: Path, layer: int, name: str) -> np.ndarray:
    """B·A of a module, in float64; alpha is the rank."""
    tensors = load_file(folder / "adapter_model.safetensors")
    module = f"base_model.model.model.layers.{layer}.{name}"
    product: np.ndarray = tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[f"{module}.lora_A.weight"]
    return product
