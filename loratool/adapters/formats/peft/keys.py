"""What the name of a tensor says: `base_model.model.` + module + slot, and the many ways to spell it.

A slot is what PEFT calls a tensor of a method, such as `lora_A`. The adapter's name stands behind it in a raw state
dict (`lora_A.default.weight`), and a wrapper of torch or of a training framework may stand anywhere. A slot that is
given as `glora_A.*` has members, each a tensor of its own: `glora_A.Xd`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = ("base_model", "model")
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
LEADING = "module"  # of a wrapper around the whole model; elsewhere it is a module that somebody called so
INNER = frozenset({"base_layer", "token_adapter"})  # stand between a module and what PEFT wrapped
TOKENS = "trainable_tokens_delta"
COPIES = ("modules_to_save", "original_module")  # stand between a module that is saved whole and its two copies
# What PEFT puts into a layer that it wraps, of whichever type.
FACTOR = re.compile(
    r"\.(?:lora_(?:A|B|E|embedding_[AB]|magnitude_vector)|(?:hada|lokr)_[wt]\d\w*|ia3_l|vera_lambda_[bd]|b?oft_[rRPs]|hra_u"
    r"|delora_(?:A|B|lambda)|miss_block|c3a_kernel|(?:hira|gralora)_[AB])\."
)
# What PEFT adds to `modules_to_save` by itself.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

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
    "unilora_": "UNILORA",
    "glora_": "GLORA",
    "deft_": "DEFT",
    "supertuning_": "SUPERTUNING",
    "peanut_": "PEANUT",
    "frod_": "FROD",
    "osf_": "OSF",
    "adamss_": "ADAMSS",
    "lily_": "LILY",
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
        if f"{path[at]}.*" in slots:
            return member(path, at)
        if path[at] in slots:
            rest = path[at + 1 :]
            bias = bool(rest) and rest[-1] == "bias"
            if rest and rest[-1] in ("weight", "bias"):
                rest = rest[:-1]
            if len(rest) > 1:  # more than the adapter's name
                return None
            return Key(".".join(path[:at]), f"{path[at]}.bias" if bias else path[at])
    return Key(".".join(path))


def has_slot(name: str, slots: Collection[str]) -> bool:
    """Whether a name spells what is in one of these slots."""
    key = split(name, slots)
    return key is not None and bool(key.slot)


def member(path: list[str], at: int) -> Key | None:
    """The key of a member of the slot at `at` of a path."""
    rest = path[at + 1 :]
    if len(rest) > 1 and rest[-1] == "weight":
        rest = rest[:-1]
    if len(rest) not in (1, 2):  # the member, behind the adapter's name or not
        return None
    return Key(".".join(path[:at]), f"{path[at]}.{rest[-1]}")


def named_in(name: str, slots: Collection[str]) -> bool:
    """Whether an adapter's name stands behind a slot, as in a raw state dict."""
    path = path_of(name)
    at = max((n for n, part in enumerate(path) if part in slots), default=len(path))
    return len([part for part in path[at + 1 :] if part not in ("weight", "bias")]) == 1


def path_of(name: str) -> list[str]:
    """The components of a name without wrappers and without PEFT's prefix."""
    path = name.split(".")
    if not WRAPPERS.isdisjoint(path):
        path = [part for part in path if part not in WRAPPERS]
    while path[:1] == [LEADING] and len(path) > 1:
        del path[0]
    if tuple(path[:2]) == PREFIX:
        return path[2:]
    return path[1:] if path[:1] == ["base_model"] and len(path) > 1 else path


def wrappers_in(name: str) -> set[str]:
    """The components of a name that wrappers of training put there."""
    parts = name.split(".")
    found = WRAPPERS.intersection(parts)
    return {*found, LEADING} if parts[0] == LEADING else {*found}


def tails(module: str) -> set[str]:
    """The dotted tails of a module's path, the whole path among them."""
    parts = module.split(".")
    return {".".join(parts[at:]) for at in range(len(parts))}


def family_of(path: str) -> str:
    """The method that something in a path is spelled as a tensor of; empty for none."""
    for part in path.split("."):
        for start, method in FAMILIES.items():
            if part.startswith(start):
                return method
    return ""


@dataclass(frozen=True)
class Paths:
    """What components such as `base_layer` are: wrappers of PEFT's, or modules of the model that have their names.

    PEFT puts `base_layer` and `token_adapter` only into modules that it adapts, and `modules_to_save` only into those
    that it saves whole. Everywhere else the name is one of the model's own.
    """

    adapted: frozenset[str]  # paths of modules that have factors, as the file spells them
    saved: tuple[str, ...]  # what the paths of modules saved whole end with
    biases: bool  # whether every bias of the model is saved

    @classmethod
    def of(cls, found: Collection[Key], config: Mapping[str, Any]) -> Paths:
        """Of an adapter whose tensors have these keys."""
        adapted = {key.module for key in found if key.slot and not key.slot.endswith(".bias")}
        adapted |= {key.module.removesuffix(".token_adapter") for key in found if key.slot == TOKENS}
        return cls(frozenset(adapted), saved_modules(config), config.get("bias") == "all")

    def plain(self, module: str) -> str:
        """The module as the model that was adapted called it."""
        kept: list[str] = []
        parts = module.split(".")
        if INNER.isdisjoint(parts):
            return module
        for part in parts:
            if part not in INNER or ".".join(kept) not in self.adapted:
                kept.append(part)
        return ".".join(kept)

    def copied(self, module: str) -> str:
        """The module that another is PEFT's copy of, with factors of its own; empty for one that is no copy."""
        parts = module.split(".")
        if COPIES[0] not in parts and COPIES[1] not in parts:
            return ""
        for at, part in enumerate(parts):
            if part in COPIES:
                head, rest = parts[:at], [p for p in parts[at + 1 :] if p != "default"]
                others = [".".join([*head, other, *rest]) for other in COPIES if other != part]
                whole = ".".join([*head, *rest])
                if whole in self.adapted or any(other in self.adapted for other in others):
                    return self.plain(whole)
        return ""

    def is_saved(self, path: str) -> bool:
        """Whether a tensor belongs to a module that is saved whole, or is a bias where all of them are."""
        if self.biases and path.endswith(".bias"):
            return True
        return any(module.endswith(self.saved) for module in beginnings(path)) if self.saved else False

    def saved_as(self, path: str) -> tuple[str, str]:
        """For a tensor that is saved whole: the parameter it is for, and what wrapped it (empty for nothing)."""
        parts = path.split(".")
        for word in COPIES[::-1]:
            if word in parts and self.is_copy(parts, at := parts.index(word)):
                rest = parts[at + 1 :]
                named = len(rest) == 2 or (len(rest) > 2 and rest[0] == "default")  # in a raw state dict
                inner = path if word == "original_module" else ".".join(parts[:at] + (rest[1:] if named else rest))
                return inner, word
        kept: list[str] = []
        wrapper = ""
        for part in parts:
            if part in INNER and (".".join(kept) in self.adapted or not self.is_saved(path)):
                wrapper = wrapper or part
            else:
                kept.append(part)
        return ".".join(kept), wrapper

    def is_copy(self, parts: list[str], at: int) -> bool:
        """Whether `modules_to_save` or `original_module` at a place of a path is PEFT's."""
        head, through, path = ".".join(parts[:at]), ".".join(parts[: at + 1]), ".".join(parts)
        return not through.endswith(self.saved) and (head.endswith(self.saved) or not self.is_saved(path))


def saved_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the paths of modules that are saved whole end with; a bare `endswith`, as in PEFT."""
    listed, task = config.get("modules_to_save"), config.get("task_type")
    names = [name for name in listed if isinstance(name, str) and name] if isinstance(listed, list) else []
    return (*names, *(HEADS.get(task, ()) if isinstance(task, str) else ()))


def beginnings(path: str) -> Iterator[str]:
    """The modules that a tensor lies in, the outermost first."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end])


def wrapped_modules(names: Iterable[str]) -> list[str]:
    """The modules of which both the `base_layer` and factors are there."""
    every = list(names)
    inner = {name[: name.index(".base_layer.")] for name in every if ".base_layer." in name}
    factors = {name[: match.start()] for name in every if (match := FACTOR.search(name))}
    return sorted(inner & factors)
