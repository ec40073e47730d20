"""An adapter in PEFT's two files, as tensors and a config that a test has made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def save_peft(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """The folder, which is made where there is none; LoRA where the config has no other method."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def named_by_peft(factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The factors of modules, B and A each, under PEFT's names; in their own dtype where none is given."""
    return {
        f"base_model.model.{module}.lora_{side}.weight": factor if dtype is None else factor.to(dtype)
        for module, (up, down) in factors.items()
        for side, factor in (("A", down), ("B", up))
    }


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return table


def edit_config(folder: Path, **changes: Any) -> None:
    """Give some fields of the config other values."""
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}, indent=2))
