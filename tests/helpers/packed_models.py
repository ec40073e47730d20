"""Small checkpoints with packed weights, written from arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from loratool.bases.codecs import decoded
from loratool.bases.decoded import Decoded
from loratool.bases.opening import open_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray


def save_packed(
    folder: Path,
    tensors: Mapping[str, NDArray[Any] | torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    metadata: dict[str, str] | None = None,
    **config: object,
) -> Path:
    """A model folder with one file of weights, whose values are written as they are."""
    folder.mkdir(parents=True)
    as_tensors = {n: v if isinstance(v, torch.Tensor) else torch.from_numpy(v.copy()) for n, v in tensors.items()}
    save_file(as_tensors, folder / "model.safetensors", metadata)
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
