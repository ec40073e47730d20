"""The config of plain LoRA on linear layers that has just been trained, each layer with its own rank and α."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratool.adapters.training import Training


def plain_config(training: Training, layers: Mapping[str, tuple[int, float]], *, whole_paths: bool) -> dict[str, Any]:
    """The config, with (rank, α) of each layer by its path.

    With `whole_paths` other layers of the model end as one of these does: PEFT takes a name for the end of a path.
    """
    exact = {path: f"^{re.escape(path)}" for path in layers}
    rank, alpha = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        **({"task_type": training.task} if training.task else {}),
        "base_model_name_or_path": training.base or None,
        "target_modules": "|".join(exact.values()) if whole_paths else list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": training.rslora,
        "lora_dropout": training.dropout,
        "rank_pattern": {exact[path]: own for path, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {exact[path]: own for path, (_, own) in layers.items() if own != alpha},
        "inference_mode": True,
    }
