"""Targets whose dots were written as underscores mean the weight of the base whose name gives them, and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import save_model
from named_updates import Targets, save_targets
from safetensors.torch import load_file

import loratool
from loratool.adapters import formats
from loratool.errors import FitError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.10.mlp.up_proj.weight"
NAMES = (Q, UP, "model.layers.1.self_attn.q_proj.weight", "a.b_c.weight", "a_b.c.weight")


def eighths(seed: int, *shape: int) -> Tensor:
    """Values of which every product and sum here is exact in float32."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Targets()))
    folder = tmp_path / "base"
    return save_model(
        folder,
        {name: eighths(at, 6, 8) for at, name in enumerate(NAMES)},
        {"model_type": "llama", "tie_word_embeddings": False},
    )


def adapter_of(folder: Path, *modules: str) -> tuple[Path, Mapping[str, Tensor]]:
    """An adapter of these modules, and ΔW of each in float64."""
    return folder, save_targets(folder, dict.fromkeys(modules, (6, 8)))


def test_a_flattened_name_is_the_weight_that_has_it_whatever_underscores_that_has(base: Path, tmp_path: Path) -> None:
    adapter, changes = adapter_of(
        tmp_path / "adapter", "model_layers_0_self_attn_q_proj", "model_layers_10_mlp_up_proj"
    )
    report = loratool.merge(base, adapter, tmp_path / "out", device="cpu")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    wanted = dict(before)
    for name, change in zip((Q, UP), changes.values(), strict=True):
        wanted[name] = (before[name].double() + change).float()
        assert not torch.equal(wanted[name], before[name])
    assert all(torch.equal(after[name], wanted[name]) for name in NAMES)
    assert report.adapters[0].unchanged == ()


def test_names_that_nothing_or_two_weights_have_are_refused_together(base: Path, tmp_path: Path) -> None:
    """With the weights that may be meant; nothing is written."""
    adapter, _ = adapter_of(tmp_path / "adapter", "a_b_c", "model_layers_7_self_attn_q_proj", Q.removesuffix(".weight"))
    with pytest.raises(FitError) as refused:
        loratool.merge(base, adapter, tmp_path / "out", device="cpu")
    told = str(refused.value)
    assert "a_b_c.weight: it may be any of a.b_c.weight, a_b.c.weight" in told
    assert "model_layers_7_self_attn_q_proj.weight: no weight of the base has this name" in told
    assert f"nearest: {Q}" in told or f"nearest: {NAMES[2]}" in told
    assert len(refused.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_one_weight_under_two_names_is_refused(base: Path, tmp_path: Path) -> None:
    adapter, _ = adapter_of(tmp_path / "adapter", Q.removesuffix(".weight"), "model_layers_0_self_attn_q_proj")
    with pytest.raises(FitError, match=rf"{Q} is edited by {Q} already"):
        loratool.merge(base, adapter, tmp_path / "out", device="cpu")


def test_a_map_leads_a_flattened_name_too(base: Path, tmp_path: Path) -> None:
    adapter, changes = adapter_of(tmp_path / "adapter", "te_layers_1_self_attn_q_proj")
    maps = [r"^te_layers_(\d+)_self_attn_q_proj=model.layers.\1.self_attn.q_proj"]
    loratool.merge(base, adapter, tmp_path / "out", maps=maps, device="cpu")
    before, after = (load_file(folder / "model.safetensors")[NAMES[2]] for folder in (base, tmp_path / "out"))
    (change,) = changes.values()
    assert torch.equal(after, (before.double() + change).float())


def test_no_adapter_is_written_whose_names_only_a_base_tells(base: Path, tmp_path: Path) -> None:
    adapter, _ = adapter_of(tmp_path / "adapter", "model_layers_0_self_attn_q_proj")
    with pytest.raises(InputError, match=r"(?s)which underscores.*model_layers_0_self_attn_q_proj\.weight"):
        loratool.resize(adapter, tmp_path / "out", rank=1, device="cpu")
    assert base.exists()
    assert not (tmp_path / "out").exists()
