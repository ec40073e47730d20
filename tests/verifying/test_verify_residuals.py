"""Adapters whose initialisation took a part from the base: all that PEFT writes of them is proven, or said to be what it is."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from merged_models import CONFIG, Tensors, codes, only, write_model
from oracle import nearest
from peft_files import edit_config
from safetensors.torch import load_file, save_file

import loratool

RANK, ALPHA, SIZE = 4, 6, 64
TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = [
    f"model.layers.{layer}.{module}.weight"
    for layer in range(2)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


@dataclass(frozen=True)
class Trained:
    """What PEFT writes of one training."""

    home: Path
    dtype: torch.dtype

    def verified(self, merged: str | Path, base: str, adapter: str) -> loratool.Verification:
        return loratool.verify(self.home / merged, self.home / base, self.home / adapter, device="cpu")

    def tensors(self, folder: str) -> Tensors:
        return load_file(self.home / folder / "model.safetensors")

    def with_changes(self, folder: str, changed: Tensors) -> str:
        """The merged model with other tensors, under another name."""
        config = json.loads((self.home / "merged" / "config.json").read_text())
        write_model(self.home / folder, {**self.tensors("merged"), **changed}, config)
        return folder


def train(home: Path, initialisation: str, dtype: torch.dtype) -> Trained:
    """Base, residual model, adapter before and after training, converted, and models merged in each way."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(dtype)
    base.save_pretrained(home / "base")
    config = peft.LoraConfig(target_modules=TARGETS, r=RANK, lora_alpha=ALPHA, init_lora_weights=initialisation)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's examples save it for the conversion
    wrapped.save_pretrained(home / "before")
    wrapped.peft_config["default"].init_lora_weights = initialisation
    copy.deepcopy(wrapped).unload().save_pretrained(home / "residual")
    numbers = torch.Generator().manual_seed(1)
    for factor in (each for name, each in wrapped.named_parameters() if "lora_" in name):
        factor.data += torch.randn(factor.shape, generator=numbers) * factor.data.std() * 0.1
    wrapped.save_pretrained(home / "adapter")
    copy.deepcopy(wrapped).merge_and_unload().save_pretrained(home / "merged")
    wrapped.save_pretrained(home / "converted", path_initial_model_for_weight_conversion=str(home / "before"))
    for name in ("adapter", "converted"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), home / name)
        loaded.merge_and_unload().save_pretrained(home / f"{name}-merged")
    return Trained(home, dtype)


KINDS = {
    "PiSSA": ("pissa", torch.bfloat16),
    "OLoRA": ("olora", torch.bfloat16),
    "PiSSA in float32": ("pissa", torch.float32),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"), *KINDS[request.param])


@pytest.mark.parametrize("merged", ["merged", "adapter-merged"])
def test_a_merge_by_peft_is_proven_with_the_residual_rounded_as_peft_does(trained: Trained, merged: str) -> None:
    """In 16 bits W without the part is rounded before the update is added; in float32 that is all within 1 ulp."""
    found = trained.verified(merged, "base", "adapter")
    assert (found.verdict, found.exit_code) == ("proven", 0), str(found)
    rounded = trained.dtype == torch.bfloat16
    assert codes(found) == ["residual-rounded"] * rounded
    assert found.rounding == ("residual" if rounded else "nearest")
    if rounded:
        assert {*found.diagnoses[0].modules} == {name.removesuffix(".weight") for name in NAMES}
    assert found.tensors is not None
    assert max(proof.ulp or 0 for proof in found.tensors.values()) <= 1


def test_a_converted_adapter_is_proven_in_what_it_was_merged_into(trained: Trained) -> None:
    found = trained.verified("converted-merged", "base", "converted")
    assert (found.verdict, codes(found)) == ("proven", []), str(found)


def test_the_residual_model_is_a_base_like_others_for_an_adapter_that_says_so(trained: Trained) -> None:
    """One that still names its initialisation would take the part away again: that is said, with the way out."""
    told = only(trained.verified("merged", "residual", "adapter"))
    assert told.code == "part-not-subtracted"
    assert "init_lora_weights has to be true" in told.text
    plain = trained.home / "plain"
    plain.mkdir(exist_ok=True)
    for file in (trained.home / "adapter").iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    edit_config(plain, init_lora_weights=True)
    found = trained.verified("merged", "residual", "plain")
    assert (found.verdict, codes(found)) == ("proven", []), str(found)


def test_a_conversion_with_rounded_factors_is_told_as_that(trained: Trained) -> None:
    """PEFT holds initial factors in the base's dtype, so what it converts is not quite what it merges."""
    found = trained.verified("merged", "base", "converted")
    if trained.dtype == torch.float32:
        assert (found.verdict, codes(found)) == ("proven", []), str(found)
        return
    told = only(found)
    assert told.code == "part-rounded"
    assert 0 < told.numbers["relative"] < 0.01
    assert {*told.modules} == {name.removesuffix(".weight") for name in NAMES}


@pytest.mark.parametrize("fault", ["update left out", "scaled", "element"])
def test_a_fault_in_one_module_is_found_in_it_alone(trained: Trained, fault: str) -> None:
    name = NAMES[4]
    weight, merged = (trained.tensors(folder)[name] for folder in ("residual", "merged"))
    wrong = merged.clone()
    if fault == "update left out":
        wrong = weight
    elif fault == "scaled":
        wrong = nearest(weight.double() + 1.5 * (merged.double() - weight.double()), trained.dtype)
    else:
        wrong[3, 5] *= 1.5
    found = trained.verified(trained.with_changes(f"wrong-{fault}", {name: wrong}), "base", "adapter")
    assert found.exit_code == 5
    failed = [each for each in found.diagnoses if not each.passes]
    assert [each.modules for each in failed] == [(name.removesuffix(".weight"),)], str(found)
    told = {"update left out": "left-out", "scaled": "factor", "element": "elements-differ"}
    assert [each.code for each in failed] == [told[fault]]
    if fault == "scaled":
        assert failed[0].numbers["factor"] == pytest.approx(1.5, rel=1e-3)
        assert failed[0].numbers["causes"] == ["scaled-twice"]  # by α/r
        assert "1.5 times the update that was trained, and once the part" in failed[0].text


def test_float32_may_lose_what_a_small_gap_between_singular_values_makes_of_its_roundings(tmp_path: Path) -> None:
    """The singular values at the cut differ by 1 in 3,000: vectors in float32 are off by thousands of roundings."""
    numbers = torch.Generator().manual_seed(1)
    name = "model.layers.0.self_attn.q_proj.weight"
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=numbers).double())[0] for _ in range(2))
    values = torch.linspace(2, 0.1, SIZE).double()
    values[RANK] = values[RANK - 1] * (1 - 3e-4)
    weight = (left * values @ right).float()
    base, config = {name: weight, "model.norm.weight": torch.ones(SIZE)}, {**CONFIG, "torch_dtype": "float32"}
    down, up = torch.randn(RANK, SIZE, generator=numbers) * 0.1, torch.randn(SIZE, RANK, generator=numbers) * 0.1
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    merged = weight - (u[:, :RANK] * s[:RANK]) @ v[:RANK] + up @ down
    write_model(tmp_path / "base", base, config)
    write_model(tmp_path / "merged", {**base, name: merged}, config)
    (tmp_path / "adapter").mkdir()
    module = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": "pissa"}
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    edit_config(tmp_path / "adapter", target_modules=["q_proj"], **said)
    found = loratool.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter", device="cpu")
    assert (found.verdict, codes(found)) == ("proven", []), str(found)
    merged[2, 2] += 0.01
    write_model(tmp_path / "merged", {**base, name: merged}, config)
    told = only(loratool.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter", device="cpu"))
    assert told.code == "elements-differ"
