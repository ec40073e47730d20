"""Experts that an adapter has apart and transformers 5 holds in one parameter: PEFT stacks their factors.

For that it wants every expert, and gives all of them the config's `r` and `lora_alpha`, whatever patterns say; the
routers beside them too, which it takes for parameters as well (`_convert_peft_config_moe` of PEFT 0.21).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loratool.layouts.fusions import FUSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

ROUTER = ".gate.weight"
PARTS = re.compile(
    "|".join(
        rf"(?:.*\.)?{re.escape(part).replace(re.escape('#'), '[0-9]+')}"
        for fusion in FUSIONS
        if fusion.of_experts
        for part in fusion.parts
    )
)


def is_expert(target: str) -> bool:
    """Whether a target is the weight of one expert, such as `….experts.3.w1.weight`."""
    return PARTS.fullmatch(target) is not None


def stacked_by_peft(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets that PEFT gives one rank and one α: experts that are apart, and the routers beside them."""
    found = list(targets)
    if not any(map(is_expert, found)):
        return ()
    return tuple(target for target in found if is_expert(target) or target.endswith(ROUTER))


def lost_by_peft(targets: Iterable[str]) -> tuple[str, ...]:
    """Layers that PEFT takes for experts, by the last part of their name, and then finds no factors for."""
    found = list(targets)
    leaves = {projection(target) for target in found if is_expert(target)}
    return tuple(target for target in found if not is_expert(target) and projection(target) in leaves)


def projection(target: str) -> str:
    return target.removesuffix(".weight").rpartition(".")[2]
