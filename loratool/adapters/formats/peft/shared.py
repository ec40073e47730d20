"""LoRA on experts of which one side is shared: a tensor for all of them, and the other side for each by its number.

Trainers that serve with SGLang write it so from Megatron-Bridge (`experts_shared_outer_loras`): the shared side has the
name without a number, as `experts.up_proj.lora_A` (1, rank, in), the others `experts.3.up_proj.lora_B` (out, rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loratool.adapters.formats.peft.draft import MISSING_PARTNER, Draft, Module
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.adapters.formats.peft.stacked import LEAVES, part_of
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.errors import Problem, printable

SIDES = ("lora_A", "lora_B")


def shared_sides(draft: Draft) -> dict[str, tuple[Module, dict[int, Module]]]:
    """Layer of all experts → its shared side, and the other side of each expert by its number."""
    found: dict[str, tuple[Module, dict[int, Module]]] = {}
    for module in draft.modules.values():
        if is_shared(module):
            found[module.name] = (module, {})
    for module in draft.modules.values() if found else ():
        outer, _, leaf = module.name.rpartition(".")
        container, _, number = outer.rpartition(".")
        if number.isdigit() and (layer := found.get(f"{container}.{leaf}")):
            layer[1][int(number)] = module
    return {name: (side, experts) for name, (side, experts) in found.items() if experts}


def is_shared(module: Module) -> bool:
    container, _, leaf = module.name.rpartition(".")
    if leaf not in LEAVES or container.rpartition(".")[2] != "experts" or len(module.slots) != 1:
        return False
    ((slot, name),) = module.slots.items()
    shape = module.draft.file.tensors[name].shape
    return slot in SIDES and len(shape) == 3 and shape[0] == 1


def read_shared(draft: Draft, found: Mapping[str, tuple[Module, Mapping[int, Module]]], scaling: Scaling) -> None:
    """Add the update of each expert's layer."""
    for name, (side, experts) in found.items():
        if missing := sorted(set(range(max(experts) + 1)) - experts.keys()):
            text = f"{printable(name)}: expert {missing[0]} has no factors, though {len(experts)} others have"
            draft.problems.append(Problem(text, MISSING_PARTNER))
            continue
        for module in experts.values():
            both = Module(draft, module.path, {**side.slots, **module.slots})
            draft.attempt(both, partial(updates_of, side=side, scaling=scaling))


def updates_of(module: Module, side: Module, scaling: Scaling) -> Mapping[str, Update]:
    """The update of one expert's layer, whose slots are those of both."""
    extra = set(module.slots) - set(SIDES)
    module.require(not extra, f"{', '.join(sorted(extra))} on experts is not something that PEFT makes")
    sides: list[Any] = [
        part_of(module.tensor(slot, (3,)), 0) if slot in side.slots else module.tensor(slot) for slot in SIDES
    ]
    a, b = sides
    module.require(b.shape[1] == a.shape[0], f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected one rank")
    return {"weight": LowRank(b, a, scaling.scale(module.name, a.shape[0]), turnable=True)}
