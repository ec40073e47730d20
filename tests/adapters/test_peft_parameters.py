"""LoRA on parameters (`target_parameters`): which factors are whose, and what they make of all experts at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import BOTH, EXPERTS, FUSED, HIDDEN, INPUTS, MIDDLE, Layers
from peft import LoraConfig
from peft_files import edit_config
from peft_zoo import assert_merged_alike, train
from safetensors.torch import load_file, save_file

import loratool

INTERLEAVED = {
    "gate_up_proj": (EXPERTS, HIDDEN, 2 * MIDDLE),
    "gate_up_proj_bias": (EXPERTS, 2 * MIDDLE),
    "down_proj": (EXPERTS, MIDDLE, HIDDEN),
    "down_proj_bias": (EXPERTS, HIDDEN),
}
DBRX = {"w1": (EXPERTS * MIDDLE, HIDDEN), "v1": (EXPERTS * MIDDLE, HIDDEN), "w2": (EXPERTS * MIDDLE, HIDDEN)}
ONE = {"gate_up_proj": (1, 2 * MIDDLE, HIDDEN), "down_proj": (1, HIDDEN, MIDDLE)}
# (sizes of the parameters, whether they are stored (in, out), what is targeted, other settings)
CASES: dict[str, tuple[Mapping[str, tuple[int, ...]], bool, list[str], dict[str, Any]]] = {
    "one parameter": (FUSED, False, ["experts.down_proj"], {}),
    "the first parameter alone": (FUSED, False, ["experts.gate_up_proj"], {}),
    "two parameters": (FUSED, False, BOTH, {}),
    "two parameters, listed the other way round": (FUSED, False, BOTH[::-1], {}),
    "one layer's": (FUSED, False, ["layers.1.experts.gate_up_proj", "0.experts.down_proj"], {}),
    "stored (in, out)": (INTERLEAVED, True, BOTH, {}),
    "with biases": (INTERLEAVED, True, [f"experts.{name}" for name in INTERLEAVED], {}),
    "matrices of all experts": (DBRX, False, ["experts.w1", "experts.v1", "experts.w2"], {}),
    "two of three": (DBRX, False, ["experts.w2", "experts.w1"], {}),
    "one expert": (ONE, False, BOTH, {}),
    "the weight of a linear layer": (FUSED, False, ["gate.weight"], {}),
    "rsLoRA": (FUSED, False, BOTH, {"use_rslora": True}),
    "patterns on the parameter's path": (
        FUSED,
        False,
        BOTH,
        {
            "rank_pattern": {"experts.gate_up_proj": 5, r".*layers\.1\.experts\.down_proj": 1},
            "alpha_pattern": {"down_proj": 11, "experts": 3},
        },
    ),
    "beside plain LoRA": (FUSED, False, BOTH, {"target_modules": ["q_proj", "gate"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_a_module_are_merged_as_peft_merges_them(tmp_path: Path, name: str) -> None:
    sizes, transposed, targets, settings = CASES[name]
    torch.manual_seed(5)
    model = Layers(sizes, transposed).eval()
    config = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": targets, **settings}
    pair = train(tmp_path, model, LoraConfig(**config), INPUTS)
    wanted = {
        parameter
        for parameter in pair.before
        if any(f".{parameter}".endswith(f".{target}") for target in targets)
        or any(f".{module}.weight" in parameter for module in config["target_modules"])
    }
    assert_merged_alike(pair.merge(tmp_path / "out"), pair, *wanted)


def adapter_of(tmp_path: Path, sizes: Mapping[str, tuple[int, ...]], targets: list[str]) -> tuple[Path, Path]:
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    pair = train(tmp_path, Layers(sizes).eval(), config, INPUTS)
    return pair.base, pair.adapter


def refusal(base: Path, adapter: Path, out: Path) -> str:
    with pytest.raises((loratool.InputError, loratool.FitError)) as error:
        loratool.merge(base, [adapter], out)
    assert not out.exists()
    return str(error.value)


def test_parameters_whose_order_nobody_knows_are_refused(tmp_path: Path) -> None:
    sizes = {"left": (EXPERTS, 4, 3), "right": (EXPERTS, 4, 3)}
    base, adapter = adapter_of(tmp_path, sizes, ["experts.left", "experts.right"])
    message = refusal(base, adapter, tmp_path / "out")
    assert "layers.0.experts" in message
    assert "left, right" in message


def test_factors_for_another_number_of_parameters_than_the_config_targets_are_refused(tmp_path: Path) -> None:
    base, adapter = adapter_of(tmp_path, FUSED, BOTH)
    edit_config(adapter, target_parameters=BOTH[:1])
    message = refusal(base, adapter, tmp_path / "out")
    assert "has factors for 2 parameters, but adapter_config.json targets 1 (gate_up_proj)" in message


def test_factors_behind_a_wrapper_that_no_target_explains_are_refused(tmp_path: Path) -> None:
    base, adapter = adapter_of(tmp_path, FUSED, BOTH)
    edit_config(adapter, target_parameters=None)
    assert "target_parameters" in refusal(base, adapter, tmp_path / "out")


def test_a_rank_that_does_not_divide_the_rows_of_all_experts_is_refused(tmp_path: Path) -> None:
    base, adapter = adapter_of(tmp_path, FUSED, BOTH)
    edit_config(adapter, r=3)
    assert "not a multiple of the rank 3" in refusal(base, adapter, tmp_path / "out")


def test_factors_of_another_number_of_experts_do_not_fit(tmp_path: Path) -> None:
    base, adapter = adapter_of(tmp_path, FUSED, BOTH)
    tensors = load_file(base / "model.safetensors")
    few = {name: tensor[:3] if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in few.items()}, base / "model.safetensors")
    assert "experts.down_proj" in refusal(base, adapter, tmp_path / "out")
