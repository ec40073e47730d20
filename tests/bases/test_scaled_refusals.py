"""What is wrong with FP8, compressed-tensors, ModelOpt and MXFP4 checkpoints is told by name, before anything is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import open_packed, save_packed
from quantised_models import FAMILIES, STACKS, Quantised
from torch import Tensor

import loratool
from loratool.bases.weights import Room

X = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.1.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def plain(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made() -> dict[str, Quantised]:
    matrix, stack = {f"{X}.weight": plain(1, 32, 96)}, {EXPERTS: plain(2, 2, 64, 10)}
    return {name: make(matrix) for name, make in FAMILIES.items()} | {"gpt-oss": STACKS["gpt-oss"](stack)}


def saved(folder: Path, whole: Quantised, change: Change) -> Path:
    tensors, config = dict(whole.tensors), copy.deepcopy(whole.config)
    change(tensors, config)
    path = save_packed(folder, tensors, config)
    for name, content in whole.files.items():
        (path / name).write_text(json.dumps(content))
    return path


def cut(ending: str, rows: int = 1) -> Change:
    """Some rows of a tensor are lost."""
    return lambda tensors, _: tensors.update({ending: tensors[ending][:-rows].clone()})


def without(ending: str) -> Change:
    return lambda tensors, _: tensors.pop(ending)


def beside(**more: Tensor) -> Change:
    return lambda tensors, _: tensors.update({f"{X}.{ending}": value for ending, value in more.items()})


def said(*path: str, value: object) -> Change:
    """The config says something else."""

    def change(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


WEIGHTS = ("config_groups", "group_0", "weights")
SHORT = torch.ones(3)
REFUSED: list[tuple[str, Change, str]] = [
    ("fp8 blocks", cut(f"{X}.weight_scale_inv"), f"{X}.weight_scale_inv: must be F32 [2, 4] for [32, 96], but it is F32 [1, 4]"),
    ("fp8 blocks", without(f"{X}.weight_scale_inv"), f"{X}.weight: is F8_E4M3 [32, 96], but its scales are missing"),
    ("fp8 blocks", said("weight_block_size", value=[16, 16]), "must be F32 [2, 6]"),
    ("fp8 blocks", said("weight_block_size", value=[0, 16]), "weight_block_size must be the rows and the columns"),
    ("fp8 blocks", said("weight_block_size", value="16x16"), "weight_block_size must be the rows and the columns"),
    ("fp8 blocks", beside(weight=plain(3, 32, 96)), f"{X}.weight_scale_inv exists too: it must be either plain or packed"),
    ("fp8 blocks", beside(weight_scale_inv=torch.ones(2, 4).int()), "but it is I32 [2, 4]"),
    ("fp8 rows (fbgemm)", cut(f"{X}.weight_scale"), "or [32, 1]"),
    ("int4 groups", cut(f"{X}.weight_scale"), f"{X}.weight_scale: must be F32 or BF16 [32, 3] for [32, 96], but it is BF16 [31, 3]"),
    ("int4 groups", cut(f"{X}.weight_packed"), f"{X}.weight_scale: must be F32 or BF16 [31, 3]"),
    ("int4 groups", said(*WEIGHTS, "group_size", value=16), "must be I32 [32, 6] for 48 columns of 4 bits"),
    ("int4 groups", said(*WEIGHTS, "group_size", value=0), "group_size must be a number of columns, but it is 0"),
    ("int4 groups", said(*WEIGHTS, "num_bits", value=8), "must be I32 [32, 24] for 96 columns of 8 bits"),
    ("int4 groups", said(*WEIGHTS, "num_bits", value=16), "weights of 16 bits and type int cannot be read"),
    ("int4 groups", said(*WEIGHTS, "type", value="float"), "is I32 [32, 12], but by the config it is float of 4 bits"),
    ("int4 groups", said(*WEIGHTS, "strategy", value="token"), "the strategy token is not one for weights"),
    ("int4 groups", said(*WEIGHTS, "symmetric", value=False), f"{X}.weight_zero_point: must be I8 [32, 3] for [32, 96], but it is missing"),
    ("int4 groups", said("format", value="marlin-24"), "the format marlin-24 cannot be read; known are pack-quantized"),
    ("int4 groups", said("sparsity_config", value={"format": "sparse-24-bitmask"}), "weights are sparse (sparse-24-bitmask)"),
    ("int4 groups", said("transform_config", value={"config_groups": {}}), "weights are rotated (transform_config)"),
    ("int4 groups", said("config_groups", value={}), f"{X}.weight: is packed, but no group of config_groups is for it"),
    ("int4 groups", said("config_groups", "group_0", "targets", value=["re:.*mlp.*"]), "no group of config_groups is for it"),
    ("int4 groups", said("config_groups", "group_0", "targets", value=["re:["]), "the targets of config_groups cannot be read"),
    ("fp8 one scale", beside(weight=torch.zeros(0, 96).to(torch.float8_e4m3fn)), f"{X}.weight: must have values, but it is F8_E4M3 [0, 96]"),
    ("modelopt FP8", beside(weight=torch.zeros(0, 96).to(torch.float8_e4m3fn)), f"{X}.weight: must have values, but it is F8_E4M3 [0, 96]"),
    ("int4 groups", without(f"{X}.weight_packed"), f"{X}.weight_packed: is missing, but {X}.weight_scale exists"),
    ("int4 groups", beside(weight=plain(3, 32, 96)), f"{X}.weight_packed exists too: it must be either plain or packed"),
    ("int4 groups", beside(weight_zero_point=torch.ones(4, 4).int()), f"{X}.weight_zero_point: must be I32 [4, 3]"),
    ("int4 act-order", beside(weight_g_idx=SHORT.int()), f"{X}.weight_g_idx: must be I32 [96], but it is I32 [3]"),
    ("int8 packed, rows", without(f"{X}.weight_shape"), f"{X}.weight_shape: must be I64 or I32 [2], but it is missing"),
    ("int8 (W8A8)", cut(f"{X}.weight_scale"), f"{X}.weight_scale: must be F32 or BF16 [32, 1]"),
    ("float8 blocks", said(*WEIGHTS, "block_structure", value=[8]), "block_structure must be rows and columns"),
    ("nvfp4", without(f"{X}.weight_global_scale"), f"{X}.weight_global_scale: must be F32 [1, 1] for [32, 96], but it is missing"),
    ("nvfp4", said(*WEIGHTS, "group_size", value=32), "must be F32 or BF16 [32, 3]"),
    ("modelopt NVFP4", without(f"{X}.weight_scale_2"), f"{X}.weight_scale_2: must be F32, but it is missing"),
    ("modelopt NVFP4", without(f"{X}.weight_scale"), f"{X}.weight_scale: must be F32 or BF16"),
    ("modelopt NVFP4", cut(f"{X}.weight_scale"), "must be [32, 6] (NVFP4) or [4, 48] (NVFP4) for U8 [32, 48]; it is F8_E4M3 [31, 6]"),
    ("modelopt NVFP4", said("quant_algo", value="NVFP5"), "packed by NVFP5 cannot be read; known are FP8"),
    ("modelopt NVFP4", beside(weight_scale_2=SHORT), "must be one scale for each matrix of U8 [32, 48], but it is F32 [3]"),
    ("modelopt NVFP4", beside(svdquant_lora_a=SHORT), "has a low-rank part of its own (svdquant_lora_a)"),
    ("modelopt NVFP4", beside(weight=plain(3, 32, 96)), f"{X}.weight_scale exists too: it must be either plain or packed"),
    ("modelopt int4", beside(pre_quant_scale=SHORT), f"{X}.pre_quant_scale: must be F32 or BF16 or F16 [96], but it is F32 [3]"),
    ("modelopt int4", beside(weight_scale_2=torch.ones(())), "is int4 made of FP8 (W4A8_AWQ), which cannot be read"),
    ("gpt-oss", cut(f"{EXPERTS}_scales"), f"{EXPERTS}_scales: must be U8 or F8_E8M0 [2, 10, 2]"),
    ("gpt-oss", without(f"{EXPERTS}_scales"), f"{EXPERTS}_scales: must be U8 or F8_E8M0 [2, 10, 2]"),
    ("gpt-oss", without(f"{EXPERTS}_blocks"), f"{EXPERTS}_blocks: is missing, but {EXPERTS}_scales exists"),
    ("gpt-oss", lambda tensors, _: tensors.update({EXPERTS: plain(3, 2, 64, 10)}), "must be either plain or packed"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "change", "told"), REFUSED)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, made: dict[str, Quantised], family: str, change: Change, told: str
) -> None:
    with pytest.raises(loratool.InputError) as caught:
        open_packed(saved(tmp_path / "base", made[family], change))
    assert told in str(caught.value).replace("\n", " ")
    assert "as BASE" in str(caught.value) or "config_groups" in str(caught.value) or "block_size" in str(caught.value)


def with_value(name: str, value: float, *, at: int = 0) -> Change:
    """One value of a tensor is another."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        flat = tensors[name].double().flatten()
        flat[at] = value
        tensors[name] = flat.to(tensors[name].dtype).view(tensors[name].shape)

    return change


NAN, INFINITE = float("nan"), float("inf")
VALUES: list[tuple[str, str, float, str]] = [
    ("fp8 blocks", "weight_scale_inv", NAN, "1 of 8 values are NaN or infinite"),
    ("fp8 blocks", "weight_scale_inv", INFINITE, "1 of 8 values are NaN or infinite"),
    ("fp8 blocks", "weight_scale_inv", 0.0, "1 of 8 values are zero"),
    ("fp8 blocks", "weight_scale_inv", -1.0, "1 of 8 values are negative"),
    ("fp8 blocks, powers of two", "weight_scale_inv", 255, "1 of 6 values are NaN"),
    ("int4 groups", "weight_scale", NAN, "1 of 96 values are NaN or infinite"),
    ("int4 act-order", "weight_g_idx", 6, "values must be from 0 to 5, but they are from 0 to 6"),
    ("int4 act-order", "weight_g_idx", -1, "values must be from 0 to 5, but they are from -1 to 5"),
    ("int4 groups", "weight_shape", 31, "it says [31, 96], but the packed values and their scales make [32, 96]"),
    ("nvfp4", "weight_scale", NAN, "1 of 192 values are NaN or infinite"),
    ("nvfp4", "weight_global_scale", 0.0, "1 of 1 values are zero"),
    ("mxfp4", "weight_scale", 255, "1 of 96 values are NaN"),
    ("modelopt NVFP4", "weight_scale_2", NAN, "1 of 1 values are NaN or infinite"),
    ("modelopt int4", "pre_quant_scale", 0.0, "1 of 96 values are zero"),
]


@pytest.mark.parametrize(("family", "ending", "value", "told"), VALUES)
def test_values_that_no_quantiser_writes_are_told(
    tmp_path: Path, made: dict[str, Quantised], family: str, ending: str, value: float, told: str
) -> None:
    folder = saved(tmp_path / "base", made[family], with_value(f"{X}.{ending}", value))
    found = open_packed(folder).weights[f"{X}.weight"].check(Room())
    assert found.startswith(f"{X}.{ending}: ")
    assert told in found


def test_experts_with_a_scale_that_is_nan_are_told(tmp_path: Path, made: dict[str, Quantised]) -> None:
    folder = saved(tmp_path / "base", made["gpt-oss"], with_value(f"{EXPERTS}_scales", 255))
    assert open_packed(folder).weights[EXPERTS].check(Room()) == f"{EXPERTS}_scales: 1 of 40 values are NaN"


LISTS = {"fp8 blocks": "modules_to_not_convert", "int4 groups": "ignore", "modelopt NVFP4": "ignore"}


@pytest.mark.parametrize("family", LISTS)
def test_a_plain_weight_that_the_config_calls_packed_is_refused(
    tmp_path: Path, made: dict[str, Quantised], family: str
) -> None:
    """The same weight of another layer is packed, so loaders take this one for packed unless it is listed."""
    folder = saved(tmp_path / "base", made[family], lambda tensors, _: tensors.update({OTHER: plain(3, 32, 96)}))
    with pytest.raises(loratool.InputError) as caught:
        open_packed(folder)
    assert f"{OTHER}: is F32 [32, 96], but the config says that it is packed" in str(caught.value)
    assert f"it is missing from {LISTS[family]}" in str(caught.value)


@pytest.mark.parametrize("family", LISTS)
@pytest.mark.parametrize("value", [5, "model.layers.1", {"model.layers.1": True}])
def test_what_is_no_list_names_no_plain_weight(
    tmp_path: Path, made: dict[str, Quantised], family: str, value: object
) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[OTHER] = plain(3, 32, 96)
        config[LISTS[family]] = value

    with pytest.raises(loratool.InputError, match=f"it is missing from {LISTS[family]}"):
        open_packed(saved(tmp_path / "base", made[family], change))


@pytest.mark.parametrize(
    ("family", "entry"),
    [
        ("fp8 blocks", "model.layers.1"),
        ("fp8 blocks", r"model\.layers\.[1-3]\..*"),
        ("fp8 blocks", "layers.1.self_attn.q_proj"),
        ("int4 groups", "model.layers.1.self_attn.q_proj"),
        ("int4 groups", r"re:.*\.1\.self_attn.*"),
        ("modelopt NVFP4", "model.layers.1*"),
        ("modelopt NVFP4", "model.layers.1.self_attn"),
    ],
)
def test_a_plain_weight_that_is_listed_stays_as_it_is(
    tmp_path: Path, made: dict[str, Quantised], family: str, entry: str
) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[OTHER] = plain(3, 32, 96)
        config[LISTS[family]] = ["lm_head", entry]

    found = open_packed(saved(tmp_path / "base", made[family], change))
    assert found.weights.keys() == {f"{X}.weight"}
    assert found.tensors[OTHER].dtype == "F32"
