"""`loratool convert`: the same ΔW in another dialect, by the formulas of the dialects, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import numbers, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters import writer
from loratool.adapters.formats import mlx
from loratool.adapters.formats.peft.spelling import Names
from loratool.errors import FitError, InputError, LoratoolError
from loratool.reworking.converting import rows

RANK = 2
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.0.mlp.down_proj": (4, 8)}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An adapter of PEFT's at α 1 and rank 2, so that a scale that is forgotten or doubled shows."""
    folder.mkdir()
    tensors = {}
    for n, (module, (out, inputs)) in enumerate(SHAPES.items()):
        rank = config.get("rank_pattern", {}).get(module, RANK)
        tensors[f"base_model.model.{module}.lora_A.weight"] = numbers(rank, inputs, seed=n).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = numbers(out, rank, seed=n + 9).to(dtype)
        if config.get("use_dora"):
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = numbers(out, seed=n + 20).abs()
    save_file(tensors, folder / WEIGHTS)
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "base_model_name_or_path": "org/base", **config}
    (folder / CONFIG).write_text(json.dumps(table))
    return folder


def delta(folder: Path, module: str, scale: float) -> Tensor:
    """ΔW by PEFT's formula."""
    tensors = load_file(folder / WEIGHTS)
    a, b = (tensors[f"base_model.model.{module}.lora_{which}.weight"].double() for which in "AB")
    return scale * (b @ a)


def mlx_delta(folder: Path, module: str) -> Tensor:
    """ΔW by mlx-lm's formula, scale · (a @ b)ᵀ."""
    tensors = load_file(folder / "adapters.safetensors")
    scale = json.loads((folder / CONFIG).read_text())["lora_parameters"]["scale"]
    a, b = (tensors[f"{module}.lora_{which}"].double() for which in "ab")
    found: Tensor = scale * (a @ b).T
    return found


def test_an_adapter_keeps_its_bytes_on_the_way_to_mlx_and_back(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    there = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    back = loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    for module in SHAPES:
        torch.testing.assert_close(mlx_delta(tmp_path / "mlx", module), delta(adapter, module, 0.5), rtol=0, atol=0)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 1, "org/base")
    assert [layer.error for report in (there, back) for layer in report.modules.values()] == [0.0] * 4


def test_scales_that_one_number_cannot_hold_go_into_the_factors(tmp_path: Path) -> None:
    """mlx-lm has one scale and one rank: the others are multiplied into B, and padded with zeros."""
    down = "model.layers.0.mlp.down_proj"
    adapter = write(tmp_path / "adapter", rank_pattern={down: 3}, alpha_pattern={down: 6})
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    for module, scale in zip(SHAPES, (0.5, 2.0), strict=True):
        torch.testing.assert_close(mlx_delta(tmp_path / "mlx", module), delta(adapter, module, scale), rtol=0, atol=0)
    assert set(report.ranks.values()) == {3}
    assert {layer.factor for layer in report.modules.values()} == {1.0, 0.25}
    assert {note.code for note in report.notes} == {"one-rank"}


def test_rslora_becomes_an_alpha(tmp_path: Path) -> None:
    """α/√r is written as α/r with another α, in 16 bits too, where a factor in B would be rounded."""
    adapter = write(tmp_path / "adapter", torch.bfloat16, use_rslora=True)
    loratool.convert(adapter, tmp_path / "plain", to="peft")
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(2**0.5, rel=1e-15)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_that_was_never_trained_is_the_same_at_any_scale(tmp_path: Path) -> None:
    """B = 0 keeps its bytes when the scale goes into it, which halves the other layer's B."""
    adapter = write(tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    zeros, other = (f"base_model.model.{module}.lora_B.weight" for module in SHAPES)
    save_file({**tensors, zeros: torch.zeros_like(tensors[zeros])}, adapter / WEIGHTS)
    report = loratool.convert(adapter, tmp_path / "served", server="sglang")
    assert [layer.error for layer in report.modules.values()] == [0.0, 0.0]
    after = load_file(tmp_path / "served" / WEIGHTS)
    assert not after[zeros].any()
    assert torch.equal(after[other], tensors[other] / 2)


def test_what_a_dialect_cannot_say_is_refused_by_name_and_left_out_on_request(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", modules_to_save=["head"])
    tensors = load_file(adapter / WEIGHTS) | {"base_model.model.head.weight": numbers(3, 4, seed=5)}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(FitError, match="tensors saved whole"):
        loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx", accept_loss=True)
    assert [note.code for note in report.lost] == ["not-in-mlx"]
    assert len(load_file(tmp_path / "mlx" / "adapters.safetensors")) == 4


def test_what_is_not_supported_is_told_before_what_a_dialect_cannot_say(tmp_path: Path) -> None:
    """--accept-loss and a merge, which help with the latter, would not help."""
    adapter = write(tmp_path / "adapter", modules_to_save=["score"])
    more = {
        f"base_model.model.score.{way}.lora_{side}.weight": numbers(*shape, seed=4)
        for way in ("modules_to_save", "original_module")
        for side, shape in (("A", (2, 4)), ("B", (3, 2)))
    }
    more["base_model.model.score.weight"] = numbers(3, 4, seed=5)
    save_file(load_file(adapter / WEIGHTS) | more, adapter / WEIGHTS)
    with pytest.raises(InputError, match="cannot convert this adapter") as refusal:
        loratool.convert(adapter, tmp_path / "out", to="mlx")
    assert "--accept-loss" not in str(refusal.value)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", use_dora=True)
    loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_output_that_differs_is_a_bug_and_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reads the file: an error in what is written, or in its config, does not pass."""
    adapter = write(tmp_path / "adapter")
    kept = mlx.MlxNames.stored

    def wrong(self: Any, form: Any, found: Any) -> Any:
        a, b = kept(self, form, found)
        return a, b * (1 + 1e-5)

    monkeypatch.setattr(mlx.MlxNames, "stored", wrong)
    with pytest.raises(LoratoolError, match="differs from what was read") as refusal:
        loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert refusal.value.exit_code == 1
    monkeypatch.setattr(mlx.MlxNames, "stored", kept)
    whole = rows.joined
    monkeypatch.setattr(rows, "joined", lambda parts, load, scales: whole(parts, load, dict.fromkeys(scales, 1.0)))
    down = "model.layers.0.mlp.down_proj"
    other = write(tmp_path / "other", alpha_pattern={down: 3})
    with pytest.raises(LoratoolError, match="q_proj"):
        loratool.convert(other, tmp_path / "mlx", to="mlx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


def with_tensors_beside(folder: Path) -> Path:
    """DoRA's lengths, biases of factors, and two modules that are saved whole."""
    adapter = write(folder, use_dora=True, lora_bias=True, lora_alpha=3, modules_to_save=["head", "tail"])
    tensors = load_file(adapter / WEIGHTS)
    for module, (out, _) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_B.bias"] = numbers(out, seed=31)
    tensors |= {
        f"base_model.model.{name}.weight": numbers(3, 4, seed=n + 40) for n, name in enumerate(("head", "tail"))
    }
    save_file(tensors, adapter / WEIGHTS)
    return adapter


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias", "head"])
def test_the_proof_covers_what_is_no_factor(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, biases and tensors saved whole that are written wrong are found out, and the target is named."""
    adapter = with_tensors_beside(tmp_path / "adapter")
    report = loratool.convert(adapter, tmp_path / "right", to="peft")
    assert set(report.beside) == {"head.weight", "tail.weight", *(f"{module}.bias" for module in SHAPES)}
    assert set(report.beside.values()) == {0.0}
    kept, whole = writer.append, Names.whole
    if part == "head":  # which are copied: the one under the name of the other
        other = {"head.weight": "tail.weight", "tail.weight": "head.weight"}
        monkeypatch.setattr(Names, "whole", lambda self, target, inside: whole(self, other[target], inside))
    else:
        monkeypatch.setattr(
            writer, "append", lambda file, name, tensor: kept(file, name, tensor * 1.001 if part in name else tensor)
        )
    with pytest.raises(LoratoolError, match="differs from what was read") as refusal:
        loratool.convert(adapter, tmp_path / "wrong", to="peft")
    assert any(
        {"lora_magnitude_vector": "q_proj.weight", "lora_B.bias": "q_proj.bias", "head": "head.weight"}[part] in p
        for p in refusal.value.problems
    )
    assert not (tmp_path / "wrong").exists()


def test_a_dry_run_writes_nothing_and_proves_nothing(tmp_path: Path) -> None:
    report = loratool.convert(write(tmp_path / "adapter"), tmp_path / "mlx", to="mlx", dry_run=True)
    assert "not read back" in str(report)
    assert not (tmp_path / "mlx").exists()


# ---- fused layers ----

EXPERTS, INNER, HIDDEN = 3, 4, 6


def moe_adapter(folder: Path) -> Path:
    """LoRA on gate, up and down of every expert, and on q, k and v with fewer rows for k and v."""
    folder.mkdir()
    shapes = {"self_attn.q_proj": (8, HIDDEN), "self_attn.k_proj": (4, HIDDEN), "self_attn.v_proj": (4, HIDDEN)}
    for expert in range(EXPERTS):
        start = f"mlp.experts.{expert}"
        shapes |= {f"{start}.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{start}.down_proj"] = (HIDDEN, INNER)
    tensors: dict[str, Tensor] = {}
    for n, (module, (out, inputs)) in enumerate(shapes.items()):
        start = f"base_model.model.model.layers.0.{module}.lora_"
        tensors |= {
            f"{start}A.weight": numbers(RANK, inputs, seed=n),
            f"{start}B.weight": numbers(out, RANK, seed=n + 50),
        }
    save_file(tensors, folder / WEIGHTS)
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(table))
    return folder


def test_experts_and_projections_become_one_layer_and_come_apart_again(tmp_path: Path) -> None:
    """PEFT's packing of experts: rows e·r + k of A, columns k·E + e of B; ΔW of an expert is α/r · B_e A_e."""
    adapter = moe_adapter(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "fused", to="peft-fused")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "fused" / WEIGHTS)
    assert len(after) == 6
    config = json.loads((tmp_path / "fused" / CONFIG).read_text())
    assert len(config["target_parameters"]) == 2
    whole = delta(tmp_path / "fused", "model.layers.0.self_attn.qkv_proj", 0.5)
    own = [delta(adapter, f"model.layers.0.self_attn.{name}_proj", 0.5) for name in "qkv"]
    torch.testing.assert_close(whole, torch.cat(own), rtol=1e-12, atol=1e-14)
    base = tmp_path / "base"
    save_model(
        base,
        {"model.norm.weight": numbers(HIDDEN, seed=1)},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "qwen3_moe"},
    )
    with pytest.raises(InputError, match="pass --base"):
        loratool.convert(tmp_path / "fused", tmp_path / "split", to="peft-split")
    loratool.convert(tmp_path / "fused", tmp_path / "split", to="peft-split", base=base)
    back = load_file(tmp_path / "split" / WEIGHTS)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_a_server_that_misreads_experts_in_one_parameter_gets_them_apart(tmp_path: Path, server: str) -> None:
    """But of a class of models that vLLM reads so, which the base tells."""
    adapter = moe_adapter(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "fused", to="peft-fused")
    report = loratool.convert(tmp_path / "fused", tmp_path / "apart", server=server)
    assert {"experts-cut", "gate-then-up"} <= {note.code for note in report.notes}
    config = json.loads((tmp_path / "apart" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config.get("target_parameters")
    for expert in range(EXPERTS):
        for part in ("gate", "up", "down"):
            module = f"model.layers.0.mlp.experts.{expert}.{part}_proj"
            found, wanted = delta(tmp_path / "apart", module, 1.0), delta(adapter, module, 0.5)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    base = tmp_path / "base"
    save_model(base, {"model.norm.weight": numbers(HIDDEN, seed=1)}, {"model_type": "qwen3_vl_moe"})
    loratool.convert(tmp_path / "fused", tmp_path / "of-base", server=server, base=base)
    config = json.loads((tmp_path / "of-base" / CONFIG).read_text())
    assert bool(config.get("target_parameters")) == (server == "vllm")


def test_experts_in_one_parameter_have_the_change_of_each(tmp_path: Path) -> None:
    adapter = moe_adapter(tmp_path / "adapter")
    report = loratool.convert(adapter, tmp_path / "fused", to="peft-fused")
    after = load_file(tmp_path / "fused" / WEIGHTS)
    names = sorted({name.partition(".lora_")[0] for name in after if ".experts" in name})
    sizes = {2 * INNER: ("gate", "up"), HIDDEN: ("down",)}
    assert len(names) == 2
    config = json.loads((tmp_path / "fused" / CONFIG).read_text())
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    assert config["lora_alpha"] / config["r"] == 0.5
    assert {name: rank / 2 for name, rank in ranks.items()} == alphas
    for name in names:
        a, b = (after[f"{name}.lora_{side}.weight"].double() for side in "AB")
        rank = a.shape[0] // EXPERTS
        for expert in range(EXPERTS):
            own = b[:, expert::EXPERTS] @ a[expert * rank : (expert + 1) * rank]
            parts = [
                delta(adapter, f"model.layers.0.mlp.experts.{expert}.{part}_proj", 0.5) for part in sizes[b.shape[0]]
            ]
            torch.testing.assert_close(0.5 * own, torch.cat(parts), rtol=1e-12, atol=1e-14)
    assert max(layer.error or 0.0 for layer in report.modules.values()) < 1e-12


def test_torchtune_gets_rows_of_queries_and_keys_in_its_order(tmp_path: Path) -> None:
    """Meta's code turns pairs of neighbouring rows of a head, transformers' a row and the one half a head further."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shapes = {
        "self_attn.q_proj": (16, 4),
        "self_attn.k_proj": (8, 4),
        "self_attn.o_proj": (4, 16),
        "mlp.up_proj": (6, 4),
    }
    tensors: dict[str, Tensor] = {}
    for n, (module, (out, inputs)) in enumerate(shapes.items()):
        start = f"base_model.model.model.layers.0.{module}.lora_"
        tensors |= {
            f"{start}A.weight": numbers(RANK, inputs, seed=n),
            f"{start}B.weight": numbers(out, RANK, seed=n + 9),
        }
    save_file(tensors, adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 1}))
    with pytest.raises(InputError, match="--base"):
        loratool.convert(adapter, tmp_path / "out", to="torchtune")
    base = tmp_path / "base"
    save_model(
        base,
        {"model.norm.weight": numbers(4, seed=1)},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"},
    )
    loratool.convert(adapter, tmp_path / "out", to="torchtune", base=base)
    after = load_file(tmp_path / "out" / WEIGHTS)
    names = {"self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj"}
    names |= {"self_attn.o_proj": "attn.output_proj", "mlp.up_proj": "mlp.w3"}
    for module, theirs in names.items():
        a, b = (tensors[f"base_model.model.model.layers.0.{module}.lora_{side}.weight"] for side in "AB")
        count = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
        if count:  # (head, half, row) → (head, row, half)
            b = b.reshape(count, 2, -1, RANK).transpose(1, 2).reshape(b.shape)
        assert torch.equal(after[f"layers.0.{theirs}.lora_a.weight"], a)
        assert torch.equal(after[f"layers.0.{theirs}.lora_b.weight"], b)
    loratool.convert(tmp_path / "out", tmp_path / "back", to="peft", base=base)
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
