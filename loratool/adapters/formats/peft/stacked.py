"""LoRA on experts with a tensor for all of them: A as (experts, rank, in) and B as (experts, out, rank).

Trainers that serve with SGLang or vLLM write it, beside PEFT's config; a side that all experts share is (1, …). ΔW of
an expert is α/r · B[e] @ A[e]. The key names the parameter: `experts.gate_up_proj` and `experts.down_proj` where the
model keeps gate and up together, else `experts.w1`, `w3` and `w2`, which are gate, up and down of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats.peft.draft import Draft, Module
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.algebra.updates.experts import ExpertFactors

PACKING = "stacked"
LIKE_PEFT = "0.21.2"  # a release in which A acts on the inputs of every expert, as it does here
FUSED = "gate_up_proj"
LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LEAVES = frozenset({FUSED, *LAYERS, *LAYERS.values()})
OLD_CONTAINER = "block_sparse_moe"  # whose experts are called w1, w2 and w3 on disk


def stacks(draft: Draft) -> dict[str, dict[str, Module]]:
    """Container of experts → parameter → its factors, where these have a dimension for the experts."""
    found: dict[str, dict[str, Module]] = {}
    for module in draft.modules.values():
        container, _, leaf = module.name.rpartition(".")
        if leaf in LEAVES and container.rpartition(".")[2] == "experts" and is_stacked(module):
            found.setdefault(container, {})[leaf] = module
    return found


def is_stacked(module: Module) -> bool:
    tensors = module.draft.file.tensors
    if not {"lora_A", "lora_B"} <= set(module.slots):
        return False
    a, b = (tensors[module.slots[slot]].shape for slot in ("lora_A", "lora_B"))
    return len(a) == len(b) == 3 and a[1] == b[2] and (a[0] == b[0] or 1 in (a[0], b[0]))


def read_stacks(draft: Draft, found: Mapping[str, Mapping[str, Module]], scaling: Scaling) -> None:
    """Add the updates of all experts: of a fused parameter one, of layers one for each expert."""
    for container, leaves in found.items():
        for leaf, module in leaves.items():
            read = partial(updates_of, module=module, leaf=leaf, beside=leaves, scaling=scaling)
            draft.attempt(Module(draft, container, module.slots), read)


def updates_of(
    _: Module, module: Module, leaf: str, beside: Mapping[str, Module], scaling: Scaling
) -> Mapping[str, Update]:
    """The updates of one of the parameters `beside` each other, by their names within the container."""
    extra = set(module.slots) - {"lora_A", "lora_B"}
    module.require(not extra, f"{', '.join(sorted(extra))} on experts is not something that PEFT makes")
    if FUSED in beside or set(beside) == {"down_proj"}:
        return {LAYERS.get(leaf, leaf): fused_factors(module, scaling)}
    count = max(each.tensor(slot, (3,)).shape[0] for each in beside.values() for slot in ("lora_A", "lora_B"))
    return layers_of(module, leaf, count, scaling)


def fused_factors(module: Module, scaling: Scaling) -> ExpertFactors:
    a, b = module.tensor("lora_A", (3,)), module.tensor("lora_B", (3,))
    scaling.scale(module.name, a.shape[1])
    alpha = scaling.alpha(module.name) if scaling.valid else 0.0
    return ExpertFactors(a, b, alpha, scaling.rslora, (a.shape[1],))


def layers_of(module: Module, leaf: str, count: int, scaling: Scaling) -> Mapping[str, Update]:
    """The update of each expert's layer, by `<expert>.<layer>.weight`."""
    a, b = module.tensor("lora_A", (3,)), module.tensor("lora_B", (3,))
    module.require(count > 1, "both factors cover all experts, and the number of experts is not recorded")
    module.require({a.shape[0], b.shape[0]} <= {1, count}, f"lora_A is {list(a.shape)}; there are {count} experts")
    scale = scaling.scale(module.name, a.shape[1])
    called = leaf if OLD_CONTAINER in module.name else LAYERS.get(leaf, leaf)
    return {
        f"{expert}.{called}.weight": LowRank(part_of(b, expert), part_of(a, expert), scale, turnable=True)  # type: ignore[arg-type]  # loaded later
        for expert in range(count)
    }


def part_of(stored: StoredTensor, expert: int) -> StoredTensor:
    """The matrix of one expert, or the one of all."""
    info, at = stored.info, expert if stored.shape[0] > 1 else 0
    size = info.nbytes // info.shape[0]
    first = info.start + at * size
    name = f"{info.name}[{at}]"
    return StoredTensor(stored.file, replace(info, name=name, shape=info.shape[1:], start=first, stop=first + size))
