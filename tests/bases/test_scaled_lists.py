"""Configs of FP8, compressed-tensors, ModelOpt and MXFP4 name what is plain as loaders match it, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import open_packed, save_packed
from quantised_models import FAMILIES, STACKS, Quantised
from torch import Tensor

import loratool

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.1.mlp.experts"


def plain(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODULES = (Q, DOWN, *(f"{EXPERTS}.{expert}.{name}" for expert in range(2) for name in ("gate_proj", "down_proj")))
WEIGHTS = {f"{module}.weight": plain(number, 32, 96) for number, module in enumerate(MODULES)}
ALL_EXPERTS = [f"{module}.weight" for module in MODULES if "experts" in module]


def settings(folder: Path, made: Quantised, modules: Collection[str], **config: object) -> list[Mapping[str, Any]]:
    """What each place says where some weights are plain; all that it said before is there, but for the lists."""
    path = save_packed(folder, made.tensors, {**made.config, **config})
    for name, content in made.files.items():
        (path / name).write_text(json.dumps(content))
    (model,) = open_packed(path).models
    return [model.left_plain(place, modules) for place in model.settings.places]


@pytest.mark.parametrize(
    ("key", "before", "added"),
    [
        ("modules_to_not_convert", None, ["lm_head", Q]),
        ("modules_to_not_convert", [], ["lm_head", Q]),
        ("modules_to_not_convert", ["model.layers.5"], ["model.layers.5", "lm_head", Q]),
        ("modules_to_not_convert", ["lm_head", Q], ["lm_head", Q]),
        ("ignored_layers", ["lm_head"], ["lm_head", Q]),
    ],
)
def test_lists_of_fp8_hold_the_head_too(tmp_path: Path, key: str, before: object, added: list[str]) -> None:
    """transformers leaves the head out by itself only where there is no list."""
    made = FAMILIES["fp8 blocks"](WEIGHTS)
    [found] = settings(tmp_path / "base", made, [f"{Q}.weight"], **{key: before})
    assert found == {**made.config, key: added}


def test_lists_of_fp8_that_loaders_read_one_before_the_other_are_both_edited(tmp_path: Path) -> None:
    lists = {"ignored_layers": ["lm_head"], "modules_to_not_convert": ["lm_head", "model.layers.7"]}
    [found] = settings(tmp_path / "base", FAMILIES["fp8 blocks"](WEIGHTS), [f"{Q}.weight"], **lists)
    assert found["ignored_layers"] == ["lm_head", Q]
    assert found["modules_to_not_convert"] == ["lm_head", "model.layers.7", Q]


@pytest.mark.parametrize("family", ["fp8 blocks", "int4 groups", "modelopt FP8"])
def test_a_layer_whose_experts_are_all_plain_is_named_as_one_module(tmp_path: Path, family: str) -> None:
    """For transformers and vLLM the experts of a layer are one module."""
    key = "modules_to_not_convert" if family == "fp8 blocks" else "ignore"
    made = FAMILIES[family](WEIGHTS)
    found = settings(tmp_path / "all", made, ALL_EXPERTS)[0][key]
    assert found == ["lm_head", *(name.removesuffix(".weight") for name in ALL_EXPERTS), EXPERTS]
    found = settings(tmp_path / "some", made, ALL_EXPERTS[1:])[0][key]
    assert EXPERTS not in found


def test_transformers_skips_what_the_list_of_fp8_names(tmp_path: Path) -> None:
    convert = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    [found] = settings(tmp_path / "base", FAMILIES["fp8 blocks"](WEIGHTS), [f"{Q}.weight", *ALL_EXPERTS])
    skipped = {name for name in (*MODULES, EXPERTS, "lm_head") if not convert(name, found["modules_to_not_convert"])}
    assert skipped == {Q, EXPERTS, "lm_head", *(m for m in MODULES if "experts" in m)}
    assert convert("model.layers.10.self_attn.q_proj", found["modules_to_not_convert"])


@pytest.mark.parametrize("before", [None, ["lm_head", "re:.*vision.*"]])
def test_compressed_tensors_ignores_whole_names(tmp_path: Path, before: list[str] | None) -> None:
    made = FAMILIES["int4 groups"](WEIGHTS)
    [found] = settings(tmp_path / "base", made, [f"{Q}.weight", f"{DOWN}.weight"], ignore=before)
    assert found == {**made.config, "ignore": [*(before or []), Q, DOWN]}


def test_both_configs_of_modelopt_exclude_the_same(tmp_path: Path) -> None:
    made = FAMILIES["modelopt NVFP4"](WEIGHTS)
    found, twin = settings(tmp_path / "base", made, [f"{Q}.weight"])
    assert found == {**made.config, "ignore": ["lm_head", Q]}
    before = made.files["hf_quant_config.json"]
    assert twin == {**before, "quantization": {**before["quantization"], "exclude_modules": ["lm_head", Q]}}


def test_modules_with_schemes_of_their_own_have_none_once_they_are_plain(tmp_path: Path) -> None:
    made = FAMILIES["modelopt FP8"](WEIGHTS)
    layers = {module: {"quant_algo": "FP8"} for module in MODULES}
    groups = {"group_0": {"weights": {"num_bits": 8}, "targets": [*MODULES]}}
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "config_groups": groups}
    found, _ = settings(tmp_path / "base", made, [f"{Q}.weight"], **config)
    assert Q not in found["quantized_layers"]
    assert found["quantized_layers"].keys() == set(MODULES) - {Q}
    assert found["config_groups"]["group_0"]["targets"] == [module for module in MODULES if module != Q]


def test_a_twin_alone_tells_that_a_model_is_modelopts(tmp_path: Path) -> None:
    """Older exports have no quantization_config in config.json."""
    made = FAMILIES["modelopt NVFP4"](WEIGHTS)
    path = save_packed(tmp_path / "base", made.tensors, None)
    (path / "hf_quant_config.json").write_text(json.dumps(made.files["hf_quant_config.json"]))
    assert open_packed(path).weights.keys() == WEIGHTS.keys()


def test_experts_of_gpt_oss_are_named_by_their_module(tmp_path: Path) -> None:
    stacks = {f"{EXPERTS}.gate_up_proj": plain(1, 2, 64, 20), f"{EXPERTS}.down_proj": plain(2, 2, 32, 64)}
    made = STACKS["gpt-oss"](stacks)
    [found] = settings(tmp_path / "base", made, [*stacks])
    before = made.config["modules_to_not_convert"]
    assert found["modules_to_not_convert"] == [*before, *stacks, EXPERTS]
    [found] = settings(tmp_path / "none", made, [*stacks], modules_to_not_convert=None)
    assert found["modules_to_not_convert"] == ["lm_head", *stacks, EXPERTS]


def test_experts_of_gpt_oss_that_are_plain_have_to_be_listed(tmp_path: Path) -> None:
    stacks = {f"{EXPERTS}.gate_up_proj": plain(1, 2, 64, 20)}
    made, other = STACKS["gpt-oss"](stacks), EXPERTS.replace("layers.1", "layers.2")
    tensors = {**made.tensors, f"{other}.gate_up_proj": plain(2, 2, 64, 20)}
    with pytest.raises(loratool.InputError, match="it is missing from modules_to_not_convert"):
        open_packed(save_packed(tmp_path / "base", tensors, made.config))
    config = {**made.config, "modules_to_not_convert": [*made.config["modules_to_not_convert"], other]}
    assert open_packed(save_packed(tmp_path / "listed", tensors, config)).weights.keys() == stacks.keys()


def test_scales_of_inputs_go_and_those_of_the_cache_stay(tmp_path: Path) -> None:
    k, v = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")
    made = FAMILIES["float8 rows"]({f"{name}.weight": plain(1, 32, 96) for name in (Q, k, v)})
    more = {f"{name}.{ending}": torch.ones(1) for name in (Q, k, v) for ending in ("input_scale", "output_scale")}
    more[f"{Q.removesuffix('.q_proj')}.k_scale"] = torch.ones(1)
    path = save_packed(tmp_path / "base", {**made.tensors, **more}, made.config)
    gone = open_packed(path).leftovers
    assert gone == {
        f"{Q}.weight": [f"{Q}.input_scale", f"{Q}.output_scale"],
        f"{k}.weight": [f"{k}.input_scale"],
        f"{v}.weight": [f"{v}.input_scale"],
    }


def test_groups_are_for_names_before_classes(tmp_path: Path) -> None:
    """Modules that a group names, or that a pattern matches, have its scheme; all others have that of their class."""
    wide, narrow = FAMILIES["int8 packed, rows"]({f"{DOWN}.weight": plain(1, 32, 96)}), FAMILIES["int4 groups"](WEIGHTS)
    config = dict(narrow.config)
    config["config_groups"] = {
        "group_0": narrow.config["config_groups"]["group_0"],
        "group_1": {**wide.config["config_groups"]["group_0"], "targets": [r"re:.*layers\.0\.mlp.*"]},
    }
    path = save_packed(tmp_path / "base", {**narrow.tensors, **wide.tensors}, config)
    schemes = {name: weight.scheme for name, weight in open_packed(path).weights.items()}
    assert schemes.pop(f"{DOWN}.weight") == "int8, one scale per row"
    assert set(schemes.values()) == {"int4, groups of 32"}


def test_classes_are_told_apart_by_what_fits(tmp_path: Path) -> None:
    eight = FAMILIES["float8 rows"]({f"{Q}.weight": plain(1, 32, 96)})
    four = FAMILIES["int4 groups"]({f"{DOWN}.weight": plain(2, 32, 96)})
    groups = {
        "group_0": {**four.config["config_groups"]["group_0"], "targets": ["Linear"]},
        "group_1": {**eight.config["config_groups"]["group_0"], "targets": ["Attention"]},
    }
    config = {**four.config, "format": "mixed-precision", "config_groups": groups}
    found = open_packed(save_packed(tmp_path / "base", {**four.tensors, **eight.tensors}, config)).weights
    assert found[f"{Q}.weight"].scheme == "FP8, one scale per row"
    assert found[f"{DOWN}.weight"].scheme == "int4, groups of 32"
