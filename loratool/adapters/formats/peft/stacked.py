"""LoRA on experts with a tensor for all of them, beside PEFT's config, as trainers that serve with SGLang or vLLM write it.

Either both sides are stacks: A (experts, rank, in) and B (experts, out, rank), of which a side that all experts share is
(1, …). The key names the parameter: `experts.gate_up_proj` and `experts.down_proj` where the model keeps gate and up
together, else `experts.w1`, `w3` and `w2`, which are gate, up and down of each expert. ΔW of an expert is α/r · B[e] @ A[e].

Or only the shared side is one, and has the name without a number, as `experts.up_proj.lora_A` (1, rank, in); the others
have their expert's, as `experts.3.up_proj.lora_B` (out, rank). So Megatron-Bridge has them (`experts_shared_outer_loras`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats.found import MISSING_PARTNER
from loratool.adapters.formats.peft.draft import Draft, Module
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.adapters.formats.rows import entry_of
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.experts import ExpertFactors

PACKING = "stacked"
LIKE_PEFT = "0.21.2"  # a release in which A acts on the inputs of every expert, as it does here
SIDES = ("lora_A", "lora_B")
FUSED = "gate_up_proj"
LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LEAVES = frozenset({FUSED, *LAYERS, *LAYERS.values()})
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # of an expert
OLD_CONTAINER = "block_sparse_moe"  # whose experts are called w1, w2 and w3 on disk


def read_stacks(draft: Draft, scaling: Scaling) -> set[str]:
    """Add the updates of all experts: of a fused parameter one, of layers one for each expert. The paths of their factors."""
    found: dict[str, dict[str, Module]] = {}  # container of experts → parameter → its factors
    for module in draft.modules.values():
        container, leaf = place_of(module)
        if container and is_stacked(module):
            found.setdefault(container, {})[leaf] = module
    for container, leaves in found.items():
        for leaf, module in leaves.items():
            read = partial(updates_of, module=module, leaf=leaf, beside=leaves, scaling=scaling)
            draft.attempt(Module(draft, container, module.slots), read)
    if found:
        draft.config = {**draft.config, "peft_version": LIKE_PEFT}
    return {module.path for leaves in found.values() for module in leaves.values()}


def place_of(module: Module) -> tuple[str, str]:
    """The container of all experts that a module lies in, and which of their layers it is; empty for any other."""
    container, _, leaf = module.name.rpartition(".")
    return (container, leaf) if leaf in LEAVES and container.rpartition(".")[2] == "experts" else ("", "")


def is_stacked(module: Module) -> bool:
    if not set(SIDES) <= set(module.slots):
        return False
    a, b = (module.draft.file.tensors[module.slots[slot]].shape for slot in SIDES)
    return len(a) == len(b) == 3 and a[1] == b[2] and (a[0] == b[0] or 1 in (a[0], b[0]))


def updates_of(
    _: Module, module: Module, leaf: str, beside: Mapping[str, Module], scaling: Scaling
) -> Mapping[str, Update]:
    """The updates of one of the parameters `beside` each other, by their names within the container."""
    refuse_others(module)
    a, b = (module.tensor(slot, (3,)) for slot in SIDES)
    scale = scaling.scale(module.name, a.shape[1])
    if FUSED in beside or set(beside) == {"down_proj"}:
        alpha = scaling.alpha(module.name) if scaling.valid else 0.0
        return {LAYERS.get(leaf, leaf): ExpertFactors(a, b, alpha, scaling.rslora, (a.shape[1],))}
    count = max(each.tensor(slot, (3,)).shape[0] for each in beside.values() for slot in SIDES)
    module.require(count > 1, "both factors cover all experts, and the number of experts is not recorded")
    module.require({a.shape[0], b.shape[0]} <= {1, count}, f"lora_A is {list(a.shape)}; there are {count} experts")
    called = leaf if OLD_CONTAINER in module.name else LAYERS.get(leaf, leaf)
    return {
        f"{expert}.{called}.weight": LowRank(matrix_of(b, expert), matrix_of(a, expert), scale, turnable=True)  # type: ignore[arg-type]  # loaded later
        for expert in range(count)
    }


def refuse_others(module: Module) -> None:
    extra = set(module.slots) - set(SIDES)
    module.require(not extra, f"{', '.join(sorted(extra))} on experts is not something that PEFT makes")


def matrix_of(stored: StoredTensor, expert: int) -> StoredTensor:
    """The matrix of one expert, or the one of all."""
    return entry_of(stored, expert if stored.shape[0] > 1 else 0)


def read_shared(draft: Draft, scaling: Scaling) -> set[str]:
    """Add the update of each expert's layer of which one side is for all. The paths of their factors."""
    sides = {module.name: module for module in draft.modules.values() if is_shared(module)}
    layers: dict[str, dict[int, Module]] = {}  # of all experts → the other side of each, by its number
    for module in draft.modules.values() if sides else ():
        outer, _, leaf = module.name.rpartition(".")
        container, _, number = outer.rpartition(".")
        if NUMBER.fullmatch(number) and f"{container}.{leaf}" in sides:
            layers.setdefault(f"{container}.{leaf}", {})[int(number)] = module
    for name, experts in layers.items():
        missing = next((number for number in range(len(experts)) if number not in experts), None)
        if missing is not None:
            draft.refuse(name, f"expert {missing} has no factors, though {len(experts)} others have", MISSING_PARTNER)
            continue
        for module in experts.values():
            draft.attempt(
                Module(draft, module.path, {**sides[name].slots, **module.slots}),
                partial(update_of, side=sides[name], scaling=scaling),
            )
    return {module.path for name, experts in layers.items() for module in (sides[name], *experts.values())}


def is_shared(module: Module) -> bool:
    if not place_of(module)[0] or len(module.slots) != 1:
        return False
    ((slot, name),) = module.slots.items()
    shape = module.draft.file.tensors[name].shape
    return slot in SIDES and len(shape) == 3 and shape[0] == 1


def update_of(module: Module, side: Module, scaling: Scaling) -> Mapping[str, Update]:
    """The update of one expert's layer, whose slots are those of both."""
    refuse_others(module)
    a, b = (entry_of(module.tensor(slot, (3,)), 0) if slot in side.slots else module.tensor(slot) for slot in SIDES)
    module.require(b.shape[1] == a.shape[0], f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected one rank")
    return {"weight": LowRank(b, a, scaling.scale(module.name, a.shape[0]), turnable=True)}  # type: ignore[arg-type]  # loaded later
