"""An adapter in PEFT's two files, as tensors and a config that a test has made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor


def save_peft(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """The folder, which is made where there is none; LoRA where the config has no other method."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return table
