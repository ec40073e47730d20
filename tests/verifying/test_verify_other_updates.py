"""Updates that are no products of two factors: their arithmetic in float32, and faults in fused modules that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from merged_models import CONFIG, HIDDEN, RANK, codes, only, scene, write_adapter, write_model
from peft_files import edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

ALPHA_OVER_R = 3.0  # 15 over 5


def dora(folder: Path, weights: dict[str, Tensor], numbers: torch.Generator, **settings: Any) -> dict[str, Tensor]:
    """Writes an adapter with magnitudes; W' in float32: m · (W + ΔW) / ‖W + ΔW‖, the norm being that of each row."""
    factors = {
        name: (
            torch.randn(RANK, weight.shape[1], generator=numbers),
            torch.randn(len(weight), RANK, generator=numbers) * 0.01,
        )
        for name, weight in weights.items()
    }
    write_adapter(folder, factors, use_dora=True, **settings)
    file = folder / "adapter_model.safetensors"
    tensors, merged = load_file(file), {}
    for name, weight in weights.items():
        down, up = factors[name]
        size = torch.linalg.vector_norm(weight.float(), dim=1) * 1.1
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = size
        changed = weight.float() + ALPHA_OVER_R * (up @ down)
        merged[name] = (size / torch.linalg.vector_norm(changed, dim=1))[:, None] * changed
    save_file(tensors, file)
    return merged


def test_what_float32_takes_from_dora_does_not_count_where_a_weight_and_its_update_cancel(tmp_path: Path) -> None:
    """Elements near zero are differences of large ones, so that they have few digits, whoever computes them."""
    plain, numbers = scene(tmp_path / "scene", torch.float32), torch.Generator().manual_seed(3)
    edited = {name: plain.weights[name] for name in plain.factors if "layers.0" in name}
    merged = dora(tmp_path / "adapter", edited, numbers)
    out = plain.write({**plain.weights, **merged}, tmp_path / "merged")
    found = loratool.verify(out, plain.base, tmp_path / "adapter", device="cpu")
    assert (found.verdict, codes(found)) == ("proven", []), str(found)
    name = min(merged)
    merged[name][1, 2] += merged[name].abs().mean() * 1e-5
    out = plain.write({**plain.weights, **merged}, tmp_path / "merged")
    told = only(loratool.verify(out, plain.base, tmp_path / "adapter", device="cpu"))
    assert (told.code, told.modules) == ("elements-differ", (name.removesuffix(".weight"),))


def test_an_update_that_is_scaled_by_the_magnitudes_of_the_next_one_is_there_once(tmp_path: Path) -> None:
    """Magnitudes of DoRA scale what an adapter before it has added; in float32, so that some elements are off by 1 ulp."""
    plain, numbers = scene(tmp_path / "scene", torch.float32), torch.Generator().manual_seed(5)
    name = min(plain.factors)
    second = dora(tmp_path / "second", {name: plain.weights[name]}, numbers)[name]
    stored = load_file(tmp_path / "second" / "adapter_model.safetensors")
    down, up = (stored[f"base_model.model.{name.replace('weight', f'lora_{side}.weight')}"] for side in "AB")
    norms = torch.linalg.vector_norm(plain.weights[name] + ALPHA_OVER_R * (up @ down), dim=1)
    factors = torch.linalg.vector_norm(second, dim=1) / norms
    merged = {**plain.merged(), name: second + factors[:, None] * plain.change(name).float()}
    out, adapters = plain.write(merged, tmp_path / "merged"), [plain.adapter, tmp_path / "second"]
    found = loratool.verify(out, plain.base, adapters, device="cpu")
    assert (found.verdict, codes(found)) == ("proven", []), str(found)


def test_noise_in_a_fused_module_is_told_where_an_update_needs_the_whole_weight(tmp_path: Path) -> None:
    """PiSSA takes away a part of W that rows alone do not tell, so no other order of rows can be tried."""
    name, numbers = "gpt_neox.layers.0.attention.query_key_value.weight", torch.Generator().manual_seed(4)
    weights = {name: torch.randn(3 * HIDDEN, HIDDEN, generator=numbers) * 0.05, "gpt_neox.norm.weight": torch.ones(9)}
    config = {**CONFIG, "model_type": "gpt_neox", "torch_dtype": "float32", "tie_word_embeddings": False}
    write_model(tmp_path / "base", weights, config)
    factors = torch.randn(RANK, HIDDEN, generator=numbers), torch.randn(3 * HIDDEN, RANK, generator=numbers) * 0.01
    adapter = write_adapter(tmp_path / "adapter", {name: factors}, target_modules=["query_key_value"])
    edit_config(adapter, init_lora_weights="pissa")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    merged[name] += torch.randn(merged[name].shape, generator=numbers) * 0.01
    write_model(tmp_path / "merged", {**merged, "gpt_neox.norm.weight": torch.ones(9)}, config)
    told = only(loratool.verify(tmp_path / "merged", tmp_path / "base", adapter, device="cpu"))
    assert told.modules == (name.removesuffix(".weight"),)
