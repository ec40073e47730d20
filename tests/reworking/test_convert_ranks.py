"""`loratool convert --rank` and `--energy`: the approximation of each layer, by SVD, and what a server makes of a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import numbers
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import UsageError

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Two layers of 24 × 32 and rank 12, one of which nearly has rank 1."""
    folder, tensors = tmp_path / "adapter", {}
    for n, (module, fade) in enumerate(((Q, 0.9), (K, 0.1))):
        tensors[f"base_model.model.{module}.lora_A.weight"] = numbers(12, 32, seed=n)
        tensors[f"base_model.model.{module}.lora_B.weight"] = numbers(24, 12, seed=n + 9) * fade ** torch.arange(12)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 12, "lora_alpha": 12, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(folder: Path, module: str) -> torch.Tensor:
    """ΔW at α = r."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{which}.weight"].double() for which in "AB")
    return b @ a


def enough(folder: Path, module: str, energy: float) -> int:
    """The smallest rank that keeps this fraction of ‖ΔW‖²."""
    squares = torch.linalg.svdvals(delta(folder, module)).square()
    return int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1


def test_rank_and_energy_together_are_the_smaller_of_both(adapter: Path, tmp_path: Path) -> None:
    assert (enough(adapter, K, 0.95), enough(adapter, Q, 0.95) > 4) == (1, True)
    report = loratool.convert(adapter, tmp_path / "out", to="peft", rank=4, energy=0.95)
    assert {name: report.ranks[f"{name}.weight"] for name in (Q, K)} == {Q: 4, K: 1}


def test_a_rank_that_a_server_does_not_take_is_raised_to_the_next_which_is_used_in_full(
    adapter: Path, tmp_path: Path
) -> None:
    """vLLM's ranks are 8, 16 and so on: zeros in place of what the adapter has would be lost for nothing."""
    report = loratool.convert(adapter, tmp_path / "out", server="vllm", rank=3)
    assert set(report.ranks.values()) == {8}
    assert [note.code for note in report.notes] == ["rank-raised"]
    for module in (Q, K):
        left, values, right = torch.linalg.svd(delta(adapter, module), full_matrices=False)
        best = left[:, :8] * values[:8] @ right[:8]
        torch.testing.assert_close(delta(tmp_path / "out", module), best, rtol=0, atol=1e-5 * float(values[0]))
        assert report.modules[f"{module}.weight"].approximated == "rank 12 → 8"


def test_where_all_layers_get_one_rank_an_approximation_uses_all_of_it(adapter: Path, tmp_path: Path) -> None:
    report = loratool.convert(adapter, tmp_path / "out", server="sglang", energy=0.95)
    needed = enough(adapter, Q, 0.95)
    assert set(report.ranks.values()) == {needed}
    assert report.modules[f"{K}.weight"].approximated == f"rank 12 → {needed}"
    assert report.notes == ()


def test_a_rank_that_a_server_takes_is_not_remarked_upon(adapter: Path, tmp_path: Path) -> None:
    report = loratool.convert(adapter, tmp_path / "out", server="vllm", rank=8)
    assert (set(report.ranks.values()), report.notes) == ({8}, ())


def test_an_architecture_of_images_is_refused_for_a_dialect_of_language_models(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--architecture is for image and video models, and mlx is for language models"
    ):
        loratool.convert(adapter, tmp_path / "out", to="mlx", architecture="sdxl")
    assert not (tmp_path / "out").exists()
