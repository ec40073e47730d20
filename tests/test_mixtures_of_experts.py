"""target_modules="all-linear" on mixtures of experts: routers and fused experts side by side, as PEFT adapts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import read_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from peft_zoo import shake
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {**EXPERTS, "head_dim": 8},  # whose experts PEFT does not take for linear layers: none are adapted
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **heads, **MODELS[kind]}))


class Trained:
    """A base, an all-linear adapter of it, and what PEFT merges."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.model = build(kind)
        self.model.save_pretrained(self.base)
        wrapped = get_peft_model(copy.deepcopy(self.model), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
        shake(wrapped, 3, 0.1)
        wrapped.save_pretrained(self.adapter)
        self.before = copy.deepcopy(self.model).state_dict()
        self.merged = wrapped.merge_and_unload()
        self.after = self.merged.state_dict()


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("mixture"), request.param)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= 2e-6, name


def test_routers_and_experts_are_merged_as_peft_merges_them(trained: Trained, tmp_path: Path) -> None:
    """Every tensor of the output, by its name on disk, is what transformers saves of PEFT's merged model."""
    loratool.merge(trained.base, [trained.adapter], tmp_path / "out")
    trained.merged.save_pretrained(tmp_path / "by_peft")
    assert_close(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "by_peft"))


REWORKED: dict[str, tuple[Callable[[Path, Path], object], float]] = {
    "rescale": (lambda source, out: loratool.rescale(source, out, scale=0.5), 0.5),
    "rescale, baked": (lambda source, out: loratool.rescale(source, out, scale=0.5, bake=True), 0.5),
    "combine": (lambda source, out: loratool.combine([source, source], out, weights=[1.0, 0.25]), 1.25),
    "resize": (lambda source, out: loratool.resize(source, out, rank=4), 1.0),
}


@pytest.mark.parametrize("name", REWORKED)
def test_peft_loads_what_is_made_of_such_an_adapter(trained: Trained, tmp_path: Path, name: str) -> None:
    """No key is missing and none unexpected, and PEFT's merge of the output is W + k · ΔW for the strength k."""
    rework, strength = REWORKED[name]
    rework(trained.adapter, tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(trained.model), tmp_path / "out")
    result = loaded.load_adapter(tmp_path / "out", "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and ".again" in key]
    found = loaded.merge_and_unload(adapter_names=["default"]).state_dict()
    wanted = {n: w + strength * (trained.after[n] - w) for n, w in trained.before.items()}
    assert_close(found, wanted)


def test_every_element_of_such_an_adapter_belongs_to_a_target(trained: Trained) -> None:
    """The parameters of the targets that `inspect` shows add up to the elements of the file's tensors."""
    report = loratool.inspect(trained.adapter)
    assert isinstance(report, loratool.AdapterFacts)
    elements = sum(tensor.numel() for tensor in read_tensors(trained.adapter).values())
    assert sum(target.parameters for target in report.targets) == elements
