"""The names of roles: how tools spell them, and where in a tensor's name they begin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

DOWN, UP, MID, UP_BIAS = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_up.bias"
ALPHA = "alpha"
WEIGHT, ON_INPUT = "weight", "on_input"  # of (IA)³, whose weight is told from any other by its partner alone

# Spellings of the two factors, without `.weight`; (rank, in) comes first.
PAIRS = (
    ("lora_down", "lora_up"),  # kohya, LyCORIS, ComfyUI
    ("lora_A", "lora_B"),  # PEFT, diffusers
    ("lora.down", "lora.up"),  # diffusers, second generation
    ("lora_linear_layer.down", "lora_linear_layer.up"),  # its text encoders
    ("_lora.down", "_lora.up"),  # its attention processors; XLabs
    ("lora_a", "lora_b"),  # torchtune
)
BARE = {"lora_A": DOWN, "lora_B": UP}  # without `.weight`: loralib, litgpt
EMBEDDING = {"lora_embedding_A": DOWN, "lora_embedding_B": UP}  # of a table, as PEFT calls them
NAMED = re.compile(r"lora_([AB])\.[^.]+\.(weight|bias)")  # with the name of an adapter in them
NUMBERED = re.compile(r"(.+_lora\d)\.((?:down|up)\.weight)")  # XLabs: the number belongs to the module
COUNTED = re.compile(r"(\w+:(?:0|[1-9]\d{0,5})):(down|up)")  # cloneofsimo: a layer is a number

MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude")
LORA = (DOWN, UP, MID, UP_BIAS)
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
IA3 = (WEIGHT, ON_INPUT)
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")
OFT = ("oft_blocks", "rescale")
OFT_OF_INPUTS = ("oft_R.weight", "oft_R.scaled_oft")
SPARSE = ("bias_indices", "bias_values", "bias_size")
RESHAPE = "reshape_weight"  # the shape that the weight is filled up to with zeros first
WHOLE = ("diff", "diff_b", "set_weight", RESHAPE, "w_norm", "b_norm")
WITHOUT_CHANGE = (ALPHA, RESHAPE)  # which change nothing alone
# Roles of methods that are recognised and not merged.
FOREIGN: Mapping[str, str] = {
    "lambda_layer": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "q_layer.weight": "T-LoRA",
    "lora_E": "AdaLoRA",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "lokr_t1": "LoKr with a Tucker core of its first factor",
}


def spellings() -> dict[str, str]:
    """Every role as it may be spelled at the end of a name, and the one name that it has here."""
    found: dict[str, str] = {}
    for down, up in PAIRS:
        found |= {f"{down}.weight": DOWN, f"{up}.weight": UP, f"{up}.bias": UP_BIAS}
    found |= {**BARE, **EMBEDDING, MID: MID, ALPHA: ALPHA, ON_INPUT: ON_INPUT}
    for role in (*MAGNITUDES, *LOHA, *LOKR, *GLORA, *OFT, *OFT_OF_INPUTS, *SPARSE, *WHOLE, *FOREIGN):
        found[role] = role
    return found


SPELLINGS: Mapping[str, str] = spellings()
LONGEST = max(role.count(".") for role in SPELLINGS)


def split(name: str) -> tuple[str, str] | None:
    """(module, role as it is spelled) of a tensor's name; None where it ends with no known role.

    The name is the two with a dot between them, or without where the role begins with `_`. The weight of (IA)³ has the
    name of any other weight; `grouped` finds it by its partner.
    """
    if match := NUMBERED.fullmatch(name) or COUNTED.fullmatch(name):
        return match[1], match[2]
    parts = name.split(".")
    for count in range(min(LONGEST + 1, len(parts) - 1), 0, -1):
        module, role = ".".join(parts[:-count]), ".".join(parts[-count:])
        if role in SPELLINGS or NAMED.fullmatch(role):
            return module, role
        before, underscore, rest = role.partition("_lora.")
        if underscore and before and f"_lora.{rest}" in SPELLINGS:
            return f"{module}.{before}", f"_lora.{rest}"
    return None


@lru_cache(maxsize=4096)  # of thousands of tensors few differ, but for names of adapters
def canonical(role: str) -> str:
    """The one name of a role, however it is spelled."""
    if match := NAMED.fullmatch(role):
        return canonical(f"lora_{match[1]}.{match[2]}")
    numbered = {"down.weight": DOWN, "up.weight": UP, "down": DOWN, "up": UP}
    return numbered.get(role) or SPELLINGS.get(role, role)


def of_factors(target: str, sources: Mapping[str, Iterable[str]]) -> bool:
    """Whether a target is the bias of a module whose weight has factors; `sources` are the tensors of all targets."""
    names = sources.get(f"{target.removesuffix('bias')}weight", ()) if target.endswith(".bias") else ()
    roles = [parts[1] for name in names if (parts := split(name))]
    return bool(roles) and not any(role in WHOLE and role not in WITHOUT_CHANGE for role in roles)


@dataclass(frozen=True)
class Grouped:
    """The tensors of a file by module."""

    modules: Mapping[str, Mapping[str, str]]  # module → role as it is spelled → name of the tensor
    rest: tuple[str, ...]  # names without a role


def grouped(names: Iterable[str]) -> Grouped:
    """All names that end with a role, by module, in the order in which modules first appear."""
    modules: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for name in names:
        if key := split(name):
            modules.setdefault(key[0], {})[key[1]] = name
        else:
            rest.append(name)
    others: list[str] = []
    for name in rest:
        module, _, role = name.rpartition(".")
        if role == WEIGHT and ON_INPUT in modules.get(module, {}):
            modules[module][WEIGHT] = name
        else:
            others.append(name)
    return Grouped(modules, tuple(others))
