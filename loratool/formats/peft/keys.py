"""What the name of a tensor says: `base_model.model.` + module + slot, and the many ways to spell it.

A slot is what PEFT calls a tensor of a method, such as `lora_A`. The adapter's name stands behind it in a raw state
dict (`lora_A.default.weight`), and a wrapper of torch or of a training framework may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PREFIX = ("base_model", "model")
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
INNER = frozenset({"base_layer", "token_adapter"})  # stand between a module and what PEFT wrapped

# What the slots of each method begin with.
FAMILIES = {
    "lora_E": "ADALORA",
    "ranknum": "ADALORA",
    "lora_": "LORA",
    "hada_": "LOHA",
    "lokr_": "LOKR",
    "ia3_": "IA3",
    "vera_": "VERA",
    "pvera_": "PVERA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "hra_": "HRA",
    "delora_": "DELORA",
    "miss_": "MISS",
    "fourierft_": "FOURIERFT",
    "shira_": "SHIRA",
    "c3a_": "C3A",
    "gralora_": "GRALORA",
    "hira_": "HIRA",
    "ln_tuning_": "LN_TUNING",
    "vblora_": "VBLORA",
    "beft_": "BEFT",
    "randlora_": "RANDLORA",
    "road_": "ROAD",
    "waveft_": "WAVEFT",
    "psoft_": "PSOFT",
    "tinylora_": "TINYLORA",
}


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart; without a slot `module` is the whole path."""

    module: str  # wrappers and prefix removed, `base_layer` kept
    slot: str = ""


def split(name: str, slots: Collection[str]) -> Key | None:
    """The key that `name` spells; None where something unknown follows the slot."""
    path = path_of(name)
    for at in range(len(path) - 1, -1, -1):
        if path[at] in slots:
            rest = path[at + 1 :]
            bias = bool(rest) and rest[-1] == "bias"
            if rest and rest[-1] in ("weight", "bias"):
                rest = rest[:-1]
            if len(rest) > 1:  # more than the adapter's name
                return None
            return Key(".".join(path[:at]), f"{path[at]}.bias" if bias else path[at])
    return Key(".".join(path))


def path_of(name: str) -> list[str]:
    """The components of a name without wrappers and without PEFT's prefix."""
    path = [part for part in name.split(".") if part not in WRAPPERS]
    if tuple(path[:2]) == PREFIX:
        return path[2:]
    return path[1:] if path[:1] == ["base_model"] and len(path) > 1 else path


def plain(module: str) -> str:
    """The module as the model that was adapted called it."""
    return ".".join(part for part in module.split(".") if part not in INNER)


def tails(module: str) -> set[str]:
    """The dotted tails of a module's path, the whole path among them."""
    parts = module.split(".")
    return {".".join(parts[at:]) for at in range(len(parts))}


def saved_as(path: str) -> tuple[str, str]:
    """For a tensor that is saved whole: the parameter it is for, and what wrapped it (empty for nothing)."""
    parts = path.split(".")
    if "original_module" in parts:
        return path, "original_module"
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        rest = parts[at + 1 :]
        named = len(rest) == 2 or (len(rest) > 2 and rest[0] == "default")  # the adapter's name, in a raw state dict
        return ".".join(parts[:at] + (rest[1:] if named else rest)), "modules_to_save"
    wrapper = next((part for part in parts if part in INNER), "")
    return plain(path), wrapper


def family_of(path: str) -> str:
    """The method that something in a path is spelled as a tensor of; empty for none."""
    for part in path.split("."):
        for start, method in FAMILIES.items():
            if part.startswith(start):
                return method
    return ""
