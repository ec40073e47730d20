"""How many parameters PEFT trains for an adapter, from what it saved."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.peft import keys
from loratool.algebra.updates.replacing import Replace
from loratool.files.safefile import FLOAT_NAMES

# Saved beside the parameters of some types, and not trained.
BUFFERS = (
    *("vera_A", "vera_B", "delora_w_norm", "randlora_A", "randlora_B", "tinylora_A", "tinylora_B", "tinylora_P"),
    *("unilora_scales_A", "unilora_scales_B", *(f"glora_{part}.zeros" for part in "ABCDE")),
)
SHARED = ("vblora_vector_bank", "tinylora_v.", "unilora_theta_d")  # trained, and of no module


def count_parameters(adapter: Adapter, in_base: set[str]) -> tuple[int, int]:
    """Parameters that were trained, and those that stand beside the base's while they are.

    PEFT trains a copy of what `modules_to_save` names, beside the module itself; biases it trains in place.
    """
    trainable = more = 0
    seen: set[str] = set()  # the tensors of a module are sources of all its updates
    for target, update in adapter.updates.items():
        tensors = [
            adapter.file.tensors[name]
            for name in adapter.sources.get(target, ())
            if name not in seen and not any(f".{buffer}" in name or name.startswith(buffer) for buffer in BUFFERS)
        ]
        seen.update(adapter.sources.get(target, ()))
        size = sum(info.elements for info in tensors if info.dtype in FLOAT_NAMES)
        if not isinstance(update, Replace) or is_trained_copy(adapter, target):
            trainable += size
            more += 2 * size if isinstance(update, Replace) and target not in in_base else size
        elif target.endswith(".bias") and adapter.config.get("bias") in ("all", "lora_only"):
            trainable += size
    bank = sum(info.elements for name, info in adapter.file.tensors.items() if any(s in name for s in SHARED))
    frozen = sum(".lora_E" in name for name in seen)  # AdaLoRA keeps each module's rank as a parameter of one number
    return trainable + bank, more + bank + frozen


def is_trained_copy(adapter: Adapter, target: str) -> bool:
    """Whether a tensor that is saved whole is of a module that PEFT trained a copy of; the name ends in an entry."""
    if adapter.config.get("peft_type") == "LN_TUNING":
        return True
    saved = keys.saved_modules(adapter.config)
    return any(module.endswith(saved) for module in keys.beginnings(target))  # one that is saved may hold others
