"""Configs of merged GPTQ and AWQ models: each loader's rule finds those modules plain that are plain in the files.

The rules are written from the loaders' sources: GPTQModel 7.3.4 (`_resolve_dynamic_override`, `QuantizeConfig`), optimum
2.3 (`GPTQQuantizer.convert_model`), vLLM (`gptq_utils`, `is_layer_skipped`), AutoAWQ 0.2.9
(`exclude_layers_to_not_quantize`) and transformers 5.23 (`should_convert_module`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import nearest
from packed_grouped import Grouped
from packed_models import save_packed
from peft_files import save_peft
from safetensors.torch import load_file

import loratool

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ATTENTION = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
EXPERTS = [f"mlp.experts.{expert}.{part}" for expert in (0, 1, 10) for part in ("gate_proj", "up_proj", "down_proj")]
LAYERS = {layer: [*ATTENTION, *(EXPERTS if layer in (2, 3) else MLP)] for layer in (0, 1, 2, 3, 11, 21)}
MODULES = [f"model.layers.{layer}.{part}" for layer, parts in LAYERS.items() for part in parts]
SHAPE = (8, 32)  # of all of them
PACKED = Grouped(*SHAPE, group=16)


def base_of(folder: Path, kind: str) -> Path:
    """A model whose attention and MLP are packed, alike in all modules, and whose head and routers are plain."""
    one = PACKED.gptq("") if kind == "gptq" else PACKED.awq("")
    tensors: dict[str, Any] = {f"{module}{part}": value for module in MODULES for part, value in one.items()}
    for layer in (2, 3):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(3, 32)
    tensors["lm_head.weight"] = torch.randn(16, 32)
    tensors["model.embed_tokens.weight"] = torch.randn(16, 32)
    common = {"bits": 4, "group_size": 16, "desc_act": False}
    more = {"zero_point": True, "version": "gemm"} if kind == "awq" else {"dynamic": {"+:.*down_proj": {"bits": 4}}}
    save_packed(folder, tensors, {"quant_method": kind, **common, **more})
    if kind == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps({**common, "sym": True}))
    return folder


def merged(base: Path, edited: Collection[str], out: Path) -> tuple[set[str], set[str]]:
    """The modules that are plain and those that are packed in a merge with an adapter for some, whose values are right.

    Plain ones are the exact sum rounded once: factors have so few bits that float64 holds it. All others are copies.
    """
    factors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    for number, module in enumerate(edited):
        draws = torch.Generator().manual_seed(number)
        down, up = (torch.randint(-8, 9, size, generator=draws) / 64 for size in ((2, SHAPE[1]), (SHAPE[0], 2)))
        changes[module] = up.double() @ down.double()
        factors |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    adapter = out.parent / "adapter"
    save_peft(adapter, factors, r=2, lora_alpha=2)
    loratool.merge(base, [adapter], out)
    found, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    packed = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    plain = {name.removesuffix(".weight") for name in found if name.endswith("_proj.weight")}
    assert plain | packed == {*MODULES}
    assert not plain & packed
    for name in [name for name in found if name.rpartition(".")[0] not in plain]:
        assert torch.equal(found[name], before[name])
    weight = torch.from_numpy(PACKED.values()).double()
    for module in plain:
        assert torch.equal(found[f"{module}.weight"], nearest(weight + changes.get(module, 0), torch.bfloat16))
    assert {*edited} <= plain
    return plain, packed


def first_rule(said: Mapping[str, Any], module: str) -> str:
    """The first rule that matches a module, as vLLM goes through them."""
    rules = said.get("dynamic", {})
    return next((rule for rule in rules if re.match(rule.removeprefix("-:").removeprefix("+:"), module)), "")


def gptqmodel(said: Mapping[str, Any], module: str) -> bool:
    rules = sorted(said.get("dynamic", {}), key=lambda rule: not rule.startswith("-"))
    return not first_rule({"dynamic": dict.fromkeys(rules)}, module).startswith("-:")


def kept(said: Mapping[str, Any]) -> list[str]:
    return [*chain.from_iterable(said["modules_in_block_to_quantize"])]


def optimum(said: Mapping[str, Any], module: str) -> bool:
    return any(module.endswith(entry) for entry in kept(said))


def fused(module: str) -> tuple[str, list[str]]:
    """What vLLM asks for: the name of its own layer, and the names of the parts of that."""
    if ".experts." in module:
        layer = module.partition(".experts.")[0] + ".experts"
        return layer, [layer]
    above, _, leaf = module.rpartition(".")
    for name, parts in FUSED.items():
        if leaf in parts:
            return f"{above}.{name}", [f"{above}.{part}" for part in parts]
    return module, [module]


def vllm_gptq(said: Mapping[str, Any], module: str) -> bool:
    layer, parts = fused(module)
    if first_rule(said, layer).startswith("-:"):
        return False
    if ".experts." in module:
        return True
    (found,) = {any(entry in part for entry in kept(said)) for part in parts}  # one answer for all parts
    return found


def vllm_awq(said: Mapping[str, Any], module: str) -> bool:
    (skipped,) = {any(entry in part for entry in said["modules_to_not_convert"]) for part in fused(module)[1]}
    return not skipped


def autoawq(said: Mapping[str, Any], module: str) -> bool:
    return not any(entry in module for entry in said["modules_to_not_convert"])


def transformers_awq(said: Mapping[str, Any], module: str) -> bool:
    ends = r"(?:(?<=\.)|(?=\.|$))"
    return not any(
        re.match(f"(?:{entry}){ends}", module) or module.endswith(entry) for entry in said["modules_to_not_convert"]
    )


EDITED = {
    "one of q, k and v of layer 1, which are not those of 11 and 21": ["model.layers.1.self_attn.q_proj"],
    "all q, k, v": [f"model.layers.{layer}.self_attn.{part}_proj" for layer in LAYERS for part in "qkv"],
    "an expert of layer 2": ["model.layers.2.mlp.experts.1.up_proj"],
    "gates and downs": ["model.layers.0.mlp.gate_proj", "model.layers.11.mlp.down_proj"],
}


@pytest.mark.parametrize("edited", EDITED.values(), ids=list(EDITED))
@pytest.mark.parametrize(
    ("kind", "loaders"),
    [("gptq", (gptqmodel, optimum, vllm_gptq)), ("awq", (vllm_awq, autoawq, transformers_awq))],
)
def test_loaders_find_plain_what_is_plain(
    tmp_path: Path, kind: str, loaders: tuple[Callable[[Mapping[str, Any], str], bool], ...], edited: list[str]
) -> None:
    base = base_of(tmp_path / "base", kind)
    plain, packed = merged(base, edited, tmp_path / "out")
    places = [json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]]
    if kind == "gptq":
        places.append(json.loads((tmp_path / "out" / "quantize_config.json").read_text()))
    for said in places:
        for loader in loaders:
            assert {module for module in MODULES if loader(said, module)} == packed, loader.__name__
    if kind == "awq":
        assert not any(transformers_awq(places[0], name) for name in ("lm_head", "model.layers.2.mlp.gate"))
        assert not any(vllm_awq(places[0], name) for name in ("lm_head", "model.layers.2.mlp.gate"))
    assert plain


def test_entries_that_a_config_has_stay(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gptq")
    merged(base, ["model.layers.11.mlp.down_proj"], tmp_path / "out")
    before = json.loads((base / "config.json").read_text())["quantization_config"]
    after = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {**before["dynamic"], **after["dynamic"]} == after["dynamic"]
    assert next(iter(after["dynamic"])).startswith("-:")
    changed = ("dynamic", "modules_in_block_to_quantize")
    assert {key: value for key, value in after.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_models_of_text_and_images_are_listed_as_they_are_in_memory_too(tmp_path: Path, kind: str) -> None:
    """transformers renames their modules when it loads them, and compares the lists with the new names."""
    base = base_of(tmp_path / "base", kind)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    _, packed = merged(base, ["model.layers.1.self_attn.q_proj"], tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for loader in (gptqmodel, optimum) if kind == "gptq" else (vllm_awq, transformers_awq):
        for before in ("model.layers.", "model.language_model.layers."):
            names = {module: module.replace("model.layers.", before) for module in MODULES}
            assert {module for module, name in names.items() if loader(said, name)} == packed
