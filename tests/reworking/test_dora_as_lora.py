"""`convert --base` where DoRA cannot be said: the leading part of W' − W, by the formula in float64, and its stated error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import numbers, save_model
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import FitError

RANK = 2
Q, OUT, TABLE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.embed_tokens"
SHAPES = {Q: (12, 8), OUT: (8, 12), TABLE: (20, 8)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    weights = {f"{module}.weight": numbers(*shape, seed=n) for n, (module, shape) in enumerate(SHAPES.items())}
    return save_model(
        folder, weights, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    )


def write(folder: Path, modules: tuple[str, ...] = (Q, OUT)) -> Path:
    """DoRA of PEFT's, with magnitudes far from the norms of W + ΔW."""
    tensors = {}
    for n, module in enumerate(modules):
        out, inputs = SHAPES[module]
        start = f"base_model.model.{module}"
        if module == TABLE:
            tensors[f"{start}.lora_embedding_A"] = numbers(RANK, out, seed=n + 20)
            tensors[f"{start}.lora_embedding_B"] = numbers(inputs, RANK, seed=n + 30)
        else:
            tensors[f"{start}.lora_A.weight"] = numbers(RANK, inputs, seed=n + 20)
            tensors[f"{start}.lora_B.weight"] = numbers(out, RANK, seed=n + 30)
        tensors[f"{start}.lora_magnitude_vector"] = numbers(inputs if module == TABLE else out, seed=n + 40).abs() + 2
    return save_peft(folder, tensors, r=RANK, lora_alpha=1, use_dora=True, target_modules=[*modules])


def change(base: Path, adapter: Path, module: str) -> Tensor:
    """W' − W by the formula of DoRA: rows of W + ΔW get the lengths m, columns where the weight is a table."""
    weight = load_file(base / "model.safetensors")[f"{module}.weight"].double()
    tensors = {name: t.double() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    start, scale, table = f"base_model.model.{module}", 1 / RANK, module == TABLE
    a, b = (tensors[f"{start}.lora_embedding_{s}" if table else f"{start}.lora_{s}.weight"] for s in "AB")
    moved = weight + scale * ((b @ a).T if table else b @ a)
    across = 0 if table else 1
    lengths = tensors[f"{start}.lora_magnitude_vector"].unsqueeze(across)
    found: Tensor = lengths * moved / moved.norm(dim=across, keepdim=True) - weight
    return found


def written(out: Path, module: str) -> Tensor:
    tensors = {name: t.double() for name, t in load_file(out / "adapter_model.safetensors").items()}
    config = json.loads((out / "adapter_config.json").read_text())
    start, table = f"base_model.model.{module}", module == TABLE
    a, b = (tensors[f"{start}.lora_embedding_{s}" if table else f"{start}.lora_{s}.weight"] for s in "AB")
    found: Tensor = config["lora_alpha"] / config["r"] * ((b @ a).T if table else b @ a)
    return found


@pytest.mark.parametrize("modules", [(Q, OUT), (OUT, TABLE)])
def test_a_server_without_dora_gets_the_leading_part_of_what_it_changes(
    base: Path, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    """No product of that rank is nearer (Eckart and Young), and the report's error is that of what was written."""
    adapter = write(tmp_path / "dora", modules)
    report = loratool.convert(adapter, tmp_path / "out", server="sglang", base=base, rank=4)
    for module in modules:
        wanted = change(base, adapter, module)
        values = torch.linalg.svdvals(wanted)
        least = float(values[4:].norm() / values.norm())
        error = float((wanted - written(tmp_path / "out", module)).norm() / wanted.norm())
        assert error == pytest.approx(least, rel=1e-5)
        layer = report.modules[f"{module}.weight"]
        assert layer.error == pytest.approx(error, rel=1e-5)
        assert layer.approximated == "DoRA → rank 4"
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not [name for name in names if "magnitude" in name]
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"]


def test_energy_chooses_the_smallest_rank_that_keeps_it(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "dora")
    report = loratool.convert(adapter, tmp_path / "out", to="gguf", base=base, energy=0.9, dry_run=True)
    for module in (Q, OUT):
        values = torch.linalg.svdvals(change(base, adapter, module)).square()
        wanted = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
        assert report.modules[f"{module}.weight"].approximated == f"DoRA → rank {wanted}"


def test_rows_of_a_fused_weight_are_found(tmp_path: Path) -> None:
    adapter = write(tmp_path / "dora", (Q,))
    weight, others = numbers(12, 8, seed=0), numbers(24, 8, seed=5)
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_attention_heads": 3, "hidden_size": 8}
    found = []
    for name, tensors in (
        ("fused", {"model.layers.0.self_attn.qkv_proj.weight": torch.cat([weight, others])}),
        ("plain", {f"{Q}.weight": weight}),
    ):
        save_model(tmp_path / name, tensors, config)
        loratool.convert(adapter, tmp_path / f"of-{name}", server="vllm", base=tmp_path / name, rank=3)
        found.append(written(tmp_path / f"of-{name}", Q))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_weight_that_is_stored_in_out_gives_factors_that_are_not(tmp_path: Path) -> None:
    """GPT-2 keeps W as (in, out); DoRA's lengths are those of its columns."""
    module, folder, home = "transformer.h.0.mlp.c_fc", tmp_path / "dora", tmp_path / "base"
    weight, a, b, lengths = (numbers(*s, seed=n) for n, s in enumerate([(12, 8), (2, 8), (12, 2), (12,)]))
    for place in (folder, home):
        place.mkdir()
    save_model(
        home,
        {f"{module}.weight": weight.T.contiguous(), f"{module}.bias": numbers(12, seed=9)},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    )
    start = f"base_model.model.{module}"
    factors = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": lengths}
    save_peft(
        folder,
        {f"{start}.{name}": value for name, value in factors.items()},
        r=2,
        lora_alpha=2,
        use_dora=True,
        fan_in_fan_out=True,
    )
    report = loratool.convert(folder, tmp_path / "out", server="vllm", base=home, rank=8)
    moved = weight.double() + b.double() @ a.double()
    wanted = lengths.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(written(tmp_path / "out", module), wanted, rtol=1e-5, atol=1e-5)
    assert report.modules[f"{module}.weight"].error == pytest.approx(0, abs=1e-6)


def test_without_a_base_or_a_rank_dora_is_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "dora")
    for given in ({}, {"base": base}, {"rank": 4}):
        with pytest.raises(FitError, match="--base with --rank or --energy approximates DoRA"):
            loratool.convert(adapter, tmp_path / "out", server="vllm", **given)
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_shapes_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "dora", (Q,))
    tensors = load_file(base / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_file({**tensors, f"{Q}.weight": numbers(14, 8, seed=1)}, other / "model.safetensors")
    (other / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(FitError, match="q_proj"):
        loratool.convert(adapter, tmp_path / "out", server="vllm", base=other, rank=4)
