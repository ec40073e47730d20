"""Updates of fused weights and of experts, put in the wrong order by the tool that merged them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merged_models import only, rounded, write_model
from peft_files import save_peft
from torch import Tensor

import loratool
from loratool.algebra.updates.additive import LowRank
from loratool.bases.edits import Edit
from loratool.bases.weights import Plain
from loratool.files.safefile import TensorInfo
from loratool.merging.output_layout import Span
from loratool.results.verify import Verification
from loratool.verifying.guesses import parts_of

HIDDEN, INNER, HEADS, KEYS, SIZE, RANK, ALPHA, EXPERTS = 32, 24, 4, 2, 8, 3, 6, 4
CONFIG = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ROWS = {"q_proj": HEADS * SIZE, "k_proj": KEYS * SIZE, "v_proj": KEYS * SIZE, "gate_proj": INNER, "up_proj": INNER}
ROWS |= {"qkv_proj": (HEADS + 2 * KEYS) * SIZE, "gate_up_proj": 2 * INNER}
QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
SPLIT = {
    QKV: [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
    GATE_UP: [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")],
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(modules: list[str]) -> dict[str, Tensor]:
    found = {
        f"{name}.weight": (normal(ROWS[name.rpartition(".")[2]], HIDDEN, seed=number) * 0.05).bfloat16()
        for number, name in enumerate(modules)
    }
    return {**found, "model.norm.weight": torch.ones(HIDDEN).bfloat16()}


def adapter(folder: Path, modules: list[str], **settings: Any) -> dict[str, Tensor]:
    """Writes one; ΔW of each module in float64."""
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for number, name in enumerate(modules):
        down, up = (
            normal(RANK, HIDDEN, seed=100 + number),
            normal(ROWS[name.rpartition(".")[2]], RANK, seed=200 + number) * 0.01,
        )
        tensors |= {f"base_model.model.{name}.lora_{letter}.weight": f for letter, f in (("A", down), ("B", up))}
        changes[name] = up.double() @ down.double() * (ALPHA / RANK)
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    save_peft(folder, tensors, **{"r": RANK, "lora_alpha": ALPHA, "target_modules": leaves, **settings})
    return changes


def verified(home: Path, base: Mapping[str, Tensor], merged: Mapping[str, Tensor], model_type: str) -> Verification:
    config = {**CONFIG, "model_type": model_type}
    write_model(home / "base", dict(base), config)
    write_model(home / "merged", dict(merged), config)
    return loratool.verify(home / "merged", home / "base", home / "adapter", device="cpu")


def fused(changes: Mapping[str, Tensor], order: list[str]) -> Tensor:
    return torch.cat([changes[name] for name in order])


def with_changes(base: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(base)
    for name, change in changes.items():
        found[f"{name}.weight"] = rounded(base[f"{name}.weight"].double() + change, torch.bfloat16)
    return found


ORDERS = {
    "sound": None,
    "gate and up swapped": (GATE_UP, [1, 0]),
    "k, q, v": (QKV, [1, 0, 2]),
    "q, v, k": (QKV, [0, 2, 1]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_split_modules_on_a_fused_base(name: str, tmp_path: Path) -> None:
    """An adapter of q, k, v, gate and up, and a base that has them fused."""
    base = weights([QKV, GATE_UP])
    changes = adapter(tmp_path / "adapter", [part for parts in SPLIT.values() for part in parts])
    made = {whole: fused(changes, parts) for whole, parts in SPLIT.items()}
    if wrong := ORDERS[name]:
        made[wrong[0]] = fused(changes, [SPLIT[wrong[0]][number] for number in wrong[1]])
    found = verified(tmp_path, base, with_changes(base, made), "phi3")
    if wrong is None:
        assert found.verdict == "proven", str(found)
    else:
        told = only(found)
        assert (told.code, told.modules) == ("fused-order", (wrong[0],)), told


@pytest.mark.parametrize("part", ["gate_proj", "v_proj"])
def test_a_part_of_a_fused_module_that_was_left_out(part: str, tmp_path: Path) -> None:
    base = weights([QKV, GATE_UP])
    changes = adapter(tmp_path / "adapter", [part for parts in SPLIT.values() for part in parts])
    for name, change in changes.items():
        if name.endswith(part):
            change.zero_()
    found = verified(tmp_path, base, with_changes(base, {w: fused(changes, p) for w, p in SPLIT.items()}), "phi3")
    told = only(found)
    assert (told.code, [name.rpartition(".")[2] for name in told.modules]) == ("left-out", [part]), told


@pytest.mark.parametrize("name", ORDERS)
def test_fused_modules_on_a_fused_base(name: str, tmp_path: Path) -> None:
    """One update for all parts, whose rows were put in another order."""
    base = weights([QKV, GATE_UP])
    changes = adapter(tmp_path / "adapter", [QKV, GATE_UP])
    if wrong := ORDERS[name]:
        whole, order = wrong
        sizes = [ROWS[part.rpartition(".")[2]] for part in SPLIT[whole]]
        changes[whole] = torch.cat([torch.split(changes[whole], sizes)[number] for number in order])
    found = verified(tmp_path, base, with_changes(base, changes), "phi3")
    if wrong is None:
        assert found.verdict == "proven", str(found)
    else:
        told = only(found)
        assert (told.code, told.modules) == ("fused-order", (wrong[0],)), told


def test_parts_whose_rows_take_turns_come_in_the_order_of_their_first_rows() -> None:
    """Of a query_key_value whose rows are one head of q, k and v after the other, for as many heads as there are."""
    update = LowRank(torch.zeros(8, RANK), torch.zeros(RANK, HIDDEN), 1.0)
    edits = tuple(
        Edit("qkv", first_row=24 * head + 8 * part, rows=8, update=update, strength=1, adapter=0, target=name, rule="")
        for head in range(HEADS)
        for part, name in enumerate(("value", "key", "query"))
    )
    info = TensorInfo("qkv", "F32", (24 * HEADS, HIDDEN), 0, 24 * HEADS * HIDDEN * 4)
    parts = parts_of(Span(Plain(SimpleNamespace(), info), info, edits))  # type: ignore[arg-type]  # no file is read
    assert [(part.count, {edit.target for edit in part.edits}) for part in parts] == [
        (8 * HEADS, {name}) for name in ("value", "key", "query")
    ]
    assert [edit.first_row for edit in parts[1].edits] == [0, 8, 16, 24]


@pytest.mark.parametrize("swapped", [False, True])
def test_fused_modules_on_a_split_base(swapped: bool, tmp_path: Path) -> None:
    base = weights(SPLIT[GATE_UP])
    changes = adapter(tmp_path / "adapter", [GATE_UP])
    halves = torch.split(changes[GATE_UP], INNER)[:: -1 if swapped else 1]
    found = verified(tmp_path, base, with_changes(base, dict(zip(SPLIT[GATE_UP], halves, strict=True))), "llama")
    if not swapped:
        assert found.verdict == "proven", str(found)
    else:
        told = only(found)
        assert (told.code, set(told.modules)) == ("fused-order", set(SPLIT[GATE_UP])), told


@pytest.mark.parametrize("fault", ["", "expert-major", "transposed"])
def test_experts_in_one_parameter(fault: str, tmp_path: Path) -> None:
    """A is stored by expert, (e · r + k); B by rank, (k · E + e), as PEFT packs them."""
    name = "model.layers.0.mlp.experts.down_proj"
    base = {name: (normal(EXPERTS, HIDDEN, HIDDEN, seed=1) * 0.05).bfloat16(), "model.norm.weight": torch.ones(HIDDEN)}
    down, up = normal(EXPERTS * RANK, HIDDEN, seed=2), normal(HIDDEN, RANK * EXPERTS, seed=3) * 0.01
    module = "base_model.model.model.layers.0.mlp.experts"
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": []}
    config |= {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.21.0"}
    save_peft(tmp_path / "adapter", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, **config)
    every = []
    for expert in range(EXPERTS):
        a = down.double()[expert * RANK : (expert + 1) * RANK]
        b = (
            up.double()[:, expert * RANK : (expert + 1) * RANK]
            if fault == "expert-major"
            else up.double()[:, expert::EXPERTS]
        )
        every.append(b @ a * (ALPHA / RANK))
    change = torch.stack(every)
    change = change.mT if fault == "transposed" else change
    merged = {**base, name: rounded(base[name].double() + change, torch.bfloat16)}
    found = verified(tmp_path, base, merged, "qwen3_moe")
    if not fault:
        assert found.verdict == "proven", str(found)
    else:
        assert only(found).code == fault


def test_one_expert_of_a_stack_that_was_left_out_is_named_alone(tmp_path: Path) -> None:
    """The adapter has one module for all experts, and the base a weight for each."""
    module, parts = "model.layers.0.mlp.experts", ("gate_proj", "up_proj")
    names = [f"{module}.{expert}.{part}.weight" for expert in range(EXPERTS) for part in parts]
    base = {name: (normal(INNER, HIDDEN, seed=number) * 0.05).bfloat16() for number, name in enumerate(names)}
    down, up = normal(EXPERTS * RANK, HIDDEN, seed=50), normal(2 * INNER, RANK * EXPERTS, seed=51) * 0.01
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [], "peft_version": "0.21.0"}
    config |= {"target_parameters": ["mlp.experts.gate_up_proj"]}
    factors = {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    save_peft(tmp_path / "adapter", factors, **config)
    changes = {}
    for expert in range(EXPERTS):
        a, b = down.double()[expert * RANK : (expert + 1) * RANK], up.double()[:, expert::EXPERTS]
        for part, change in zip(parts, torch.split(b @ a * (ALPHA / RANK), INNER), strict=True):
            changes[f"{module}.{expert}.{part}"] = change
    left = f"{module}.2.up_proj"
    changes[left] = torch.zeros_like(changes[left])
    told = only(verified(tmp_path, base, with_changes(base, changes), "qwen3_moe"))
    assert (told.code, told.modules) == ("left-out", (left,))
