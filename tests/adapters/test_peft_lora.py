"""LoRA, its variants and its options are merged as PEFT merges them, or as its forward computes where it merges wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_variants import VARIANTS
from peft import LoraConfig, get_peft_model
from peft_files import edit_config, save_peft
from peft_zoo import assert_merged_alike, make_zoo, output_of, save_base, shake, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.results.facts import AdapterFacts


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_lora_is_merged_as_peft_merges_it(tmp_path: Path, name: str) -> None:
    zoo = make_zoo()
    pair = train(tmp_path, zoo, VARIANTS[name].config())
    found = pair.merge(tmp_path / "out")
    assert_merged_alike(found, pair, *VARIANTS[name].edited)
    torch.testing.assert_close(output_of(found, zoo), pair.output, rtol=1e-4, atol=1e-4)


class Volumes(nn.Module):
    """Three-dimensional convolutions, among them those that PEFT cannot merge."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv3d(3, 4, 1)
        self.long = nn.Conv3d(4, 5, (1, 1, 3))
        self.cube = nn.Conv3d(5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.cube(torch.tanh(self.long(torch.tanh(self.one(x)))))
        return result


@pytest.mark.parametrize("dora", [False, True])
def test_a_three_dimensional_convolution_is_merged_as_its_forward_computes(tmp_path: Path, dora: bool) -> None:
    """PEFT's own merge ends in an error where the first two sizes of a kernel are 1."""
    torch.manual_seed(1)
    model, inputs = Volumes().eval(), torch.randn(2, 3, 4, 4, 5)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["one", "long", "cube"], use_dora=dora)
    if dora:  # whose norm needs the update that PEFT cannot compute
        config.target_modules = {"cube"}
    pair = train(tmp_path, model, config, inputs, merge=lambda wrapped: wrapped.get_base_model())
    merged = output_of(pair.merge(tmp_path / "out"), model, inputs)
    torch.testing.assert_close(merged, pair.output, rtol=1e-5, atol=1e-5)
    assert float((merged - output_of(pair.before, model, inputs)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("version", "times"),
    [("0.21.2", 2), ("0.18.0.dev0@1a2b", 2), (None, 2), ("", 2), ("0.21.3", 1), ("0.22.0.dev0", 1), ("1.0", 1)],
)
def test_the_out_proj_of_attention_counts_twice_up_to_the_release_that_trained_it_so(
    tmp_path: Path, version: str | None, times: int
) -> None:
    zoo = make_zoo()
    pair = train(tmp_path, zoo, LoraConfig(r=3, lora_alpha=5, target_modules=["attention"]))
    edit_config(pair.adapter, peft_version=version)
    report = loratool.merge(pair.base, [pair.adapter], tmp_path / "out")
    assert any("out_proj" in note and "twice" in note for note in map(str, report.notes)) == (times == 2)
    stored = load_file(pair.adapter / "adapter_model.safetensors")
    start = "base_model.model.attention.base_layer.out_proj.lora_"
    change = 5 / 3 * stored[f"{start}B.weight"].double() @ stored[f"{start}A.weight"].double()
    wanted = pair.before["attention.out_proj.weight"] + times * change
    found = load_file(tmp_path / "out" / "model.safetensors")["attention.out_proj.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_qalora_is_merged_as_its_forward_computes(tmp_path: Path) -> None:
    """PEFT never merges it; its forward takes means of groups of inputs, times their number."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(6, 20, generator=generator), torch.randn(9, 20, generator=generator)
    a, b = torch.randn(3, 5, generator=generator), torch.randn(6, 3, generator=generator)
    (tmp_path / "base").mkdir()
    save_file({"q.weight": weight}, tmp_path / "base" / "model.safetensors")
    write_adapter(
        tmp_path / "adapter",
        {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b},
        use_qalora=True,
        qalora_group_size=4,
        r=3,
        lora_alpha=5,
    )
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"].double()
    pooled = x.double().reshape(9, 5, 4).mean(2) * 5
    forward = x.double() @ weight.double().T + pooled @ a.double().T @ b.double().T * 5 / 3
    torch.testing.assert_close(x.double() @ merged.T, forward, rtol=1e-5, atol=1e-4)


def test_qalora_on_a_layer_that_is_not_quantised_is_plain_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["linear"], use_qalora=True, qalora_group_size=4)
    pair = train(tmp_path, make_zoo(), config)
    assert_merged_alike(pair.merge(tmp_path / "out"), pair, "linear.weight")


@pytest.mark.parametrize("target", ["linear", "c_attn", "embed", "conv2"])
def test_several_dora_adapters_take_their_norms_from_the_unmerged_weight(tmp_path: Path, target: str) -> None:
    """PEFT gives f_b·(f_a·(W + Δa) + Δb), each f from W."""
    zoo = make_zoo()
    base = save_base(tmp_path / "base", zoo)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[target], use_dora=True)
    wrapped = get_peft_model(copy.deepcopy(zoo), config, "first")
    wrapped.add_adapter("second", LoraConfig(r=2, lora_alpha=7, target_modules=[target], use_dora=True))
    for number, name in enumerate(("first", "second")):
        wrapped.set_adapter(name)
        shake(wrapped, number, 0.1)
    wrapped.save_pretrained(tmp_path / "adapters")
    wrapped.base_model.set_adapter(["first", "second"])
    wanted = wrapped.merge_and_unload().state_dict()[f"{target}.weight"]
    both = [tmp_path / "adapters" / name for name in ("first", "second")]
    loratool.merge(base, both, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{target}.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_under_dora_stays_zero_instead_of_nan(tmp_path: Path) -> None:
    zoo = make_zoo()
    with torch.no_grad():
        zoo.square.weight[4] = 0
    pair = train(tmp_path, zoo, LoraConfig(r=3, target_modules=["square"], use_dora=True), merge=unmerged)
    path = pair.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.square.lora_B.weight"][4] = 0
    save_file(tensors, path)
    merged = pair.merge(tmp_path / "out")["square.weight"]
    assert not merged[4].any()
    magnitude = load_file(path)["base_model.model.square.lora_magnitude_vector"]
    torch.testing.assert_close(merged.norm(dim=1)[5:], magnitude[5:], rtol=1e-5, atol=1e-6)


def unmerged(wrapped: Any) -> nn.Module:
    """For a merge that PEFT gets wrong: nothing to compare with."""
    model: nn.Module = wrapped.get_base_model()
    return model


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
def test_a_weight_moves_dora_along_the_line_through_its_full_merge(tmp_path: Path, weight: float) -> None:
    pair = train(tmp_path, make_zoo(), LoraConfig(r=3, target_modules=["linear", "c_attn"], use_dora=True))
    found = pair.merge(tmp_path / "out", weights=[weight])
    for name in ("linear.weight", "c_attn.weight"):
        wanted = pair.before[name].lerp(pair.merged[name], weight)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)


def test_of_several_alpha_patterns_the_first_in_the_file_counts_and_it_is_said(tmp_path: Path) -> None:
    """Saving sorts the patterns: PEFT itself loads the adapter with another α than it was trained with."""
    pair = train(tmp_path, make_zoo(), LoraConfig(r=2, target_modules=["linear", "square"]))
    edit_config(pair.adapter, alpha_pattern={"square": 3, "linear": 4, ".*": 6})
    report = loratool.merge(pair.base, [pair.adapter], tmp_path / "out")
    told = [note for note in map(str, report.notes) if "several alpha patterns" in note]
    assert len(told) == 2
    assert any("(4, 6)" in note and "4 is used" in note for note in told)
    stored = load_file(pair.adapter / "adapter_model.safetensors")
    for name, alpha in (("linear", 4), ("square", 3)):
        a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        wanted = pair.before[f"{name}.weight"] + alpha / 2 * b @ a
        found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_an_alpha_pattern_that_names_nothing_is_told(tmp_path: Path) -> None:
    pair = train(tmp_path, make_zoo(), LoraConfig(r=2, target_modules=["linear"]))
    edit_config(pair.adapter, alpha_pattern={"nowhere": 2, "linear": 2})
    report = loratool.merge(pair.base, [pair.adapter], tmp_path / "out")
    assert any("'nowhere'" in note and "'linear'" not in note for note in map(str, report.notes)), report.notes


def test_a_rank_pattern_that_names_nothing_is_refused(tmp_path: Path) -> None:
    pair = train(tmp_path, make_zoo(), LoraConfig(r=2, target_modules=["linear"]))
    edit_config(pair.adapter, rank_pattern={"nowhere": 2, "linear": 2})
    with pytest.raises(loratool.InputError, match=r"patterns in rank_pattern .* 'nowhere'$"):
        loratool.merge(pair.base, [pair.adapter], tmp_path / "out")


def test_a_field_of_the_config_that_nobody_knows_is_told(tmp_path: Path) -> None:
    pair = train(tmp_path, make_zoo(), LoraConfig(r=2, target_modules=["linear"]))
    edit_config(pair.adapter, use_tomorrows_lora=True)
    notes = loratool.merge(pair.base, [pair.adapter], tmp_path / "out").notes
    assert sum("use_tomorrows_lora" in note for note in map(str, notes)) == 1


def test_inspect_tells_the_variant_and_the_ranks_within_it(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["linear", "square"], use_dora=True, use_rslora=True)
    facts = loratool.inspect(train(tmp_path, make_zoo(), config).adapter)
    assert isinstance(facts, AdapterFacts)
    assert set(facts.variants) == {"DoRA", "rsLoRA"}
    assert facts.ranks == {"3": 2}
    assert facts.alphas == {"6": 2}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    return save_peft(folder, tensors, **config)


def wrap_keys(spell: Callable[[str], str]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file({spell(name): tensor for name, tensor in load_file(path).items()}, path)

    return change


def named(key: str) -> str:
    """With the adapter's name, as in a raw state dict."""
    for slot in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{slot}", f".{slot}.default")
    return key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name": named,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled around PEFT": lambda key: f"_orig_mod.{key}",
    "FSDP": lambda key: key.replace("base_model.model.", "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module."),
    "DDP": lambda key: f"module.{key}",
    "a wrapper around each layer": lambda key: key.replace(".lora_", "._fsdp_wrapped_module.lora_"),
    "the weight of a magnitude": lambda key: f"{key}.weight" if key.endswith("magnitude_vector") else key,
    "all of it": lambda key: f"module._orig_mod.{named(key.removeprefix('base_model.model.'))}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_adapter_in_other_spellings_merges_to_the_same_bytes(tmp_path: Path, spelling: str) -> None:
    config = LoraConfig(r=3, target_modules=["embed", "linear", "conv1"], use_dora=True, modules_to_save=["head"])
    pair = train(tmp_path, make_zoo(), config)
    plain = loratool.merge(pair.base, [pair.adapter], tmp_path / "plain").digests
    wrap_keys(SPELLINGS[spelling])(pair.adapter)
    assert loratool.merge(pair.base, [pair.adapter], tmp_path / "spelt").digests == plain


def test_a_raw_state_dict_with_what_peft_wraps_merges_too(tmp_path: Path) -> None:
    """As trainers that do not know PEFT write it: untrained copies, names of adapters, and all."""
    config = LoraConfig(r=3, target_modules=["linear"], modules_to_save=["head"])
    zoo = make_zoo()
    pair = train(tmp_path, zoo, config)
    torch.manual_seed(3)
    wrapped = get_peft_model(zoo, config)
    shake(wrapped, 3, 0.1)
    raw = {
        name: tensor.contiguous().clone()
        for name, tensor in wrapped.state_dict().items()
        if "lora_" in name or "modules_to_save" in name or "original_module" in name
    }
    assert any(".original_module." in name for name in raw)
    assert any(".modules_to_save.default." in name for name in raw)
    save_file(raw, pair.adapter / "adapter_model.safetensors")
    assert_merged_alike(pair.merge(tmp_path / "out"), pair, "linear.weight", "head.weight", "head.bias")


def test_rslora_divides_by_the_root_of_the_rank_of_each_module(tmp_path: Path) -> None:
    """Against the formula written out, without PEFT."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 5, generator=generator)
    a, b = torch.randn(9, 5, generator=generator), torch.randn(6, 9, generator=generator)
    (tmp_path / "base").mkdir()
    save_file({"q.weight": weight}, tmp_path / "base" / "model.safetensors")
    write_adapter(
        tmp_path / "adapter",
        {"q.lora_A.weight": a, "q.lora_B.weight": b},
        r=4,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"q": 9},
    )
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    wanted = weight.double() + 5 / math.sqrt(9) * b.double() @ a.double()
    found = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
