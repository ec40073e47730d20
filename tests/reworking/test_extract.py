"""`extract`: the adapter between two checkpoints. Oracles: dense SVD in float64, PEFT on the real model, and `merge`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import gguf_bytes
import numpy as np
import peft_zoo
import pytest
import tiny_models
import torch
import transformers
from checkpoints import planted, save_model, seeded
from oracle import read_tensors
from peft import PeftModel
from peft_files import config_of
from torch import Tensor

import loratool
from loratool import extract
from loratool.algebra.lowrank.sketching import sketch
from loratool.errors import FitError, InputError, LoratoolError, UsageError

if TYPE_CHECKING:
    from loratool.results.extract import ExtractReport

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


def moved(base: Path, tuned: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A copy of a checkpoint with the tensors that `change` gives another value."""
    tensors = read_tensors(base)
    for name, tensor in tensors.items():
        if (new := change(name, tensor)) is not None:
            tensors[name] = (tensor.double() + new.double()).to(tensor.dtype)
    return save_model(tuned, tensors, json.loads((base / "config.json").read_text()))


def low_rank(rank: int) -> Callable[[str, Tensor], Tensor | None]:
    """A change of that rank to every matrix and convolution."""
    return lambda name, tensor: planted(tensor, rank, sum(name.encode())) if tensor.dim() > 1 else None


def shake(name: str, tensor: Tensor) -> Tensor:
    """A change of low rank to every matrix, and any change to what is no matrix."""
    if tensor.dim() > 1:
        return planted(tensor, 2, sum(name.encode()))
    return torch.randn(tensor.shape, generator=seeded(len(name)), dtype=torch.float64) * 0.1


def small(dtype: torch.dtype = torch.float32) -> Tensors:
    """Four matrices of two layers."""
    return {
        f"model.layers.{layer}.{name}.weight": (torch.randn(96, 64, generator=seeded(10 * layer + at)) * 0.1).to(dtype)
        for layer in range(2)
        for at, name in enumerate(("self_attn.q_proj", "mlp.up_proj"))
    }


def factors(adapter: Path) -> Tensors:
    return read_tensors(adapter / "adapter_model.safetensors")


def product(adapter: Path, module: str) -> Tensor:
    tensors = factors(adapter)
    up, down = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "BA")
    return up @ down


def assert_merges_to(base: Path, adapter: Path, tuned: Path, out: Path, tolerance: float = 2e-6) -> None:
    loratool.merge(base, [adapter], out)
    after, wanted = read_tensors(out), read_tensors(tuned)
    assert set(after) == set(wanted)
    for name, tensor in wanted.items():
        off = (after[name].double() - tensor.double()).abs().max()
        assert float(off) <= tolerance, f"{name}: off by {float(off):.2g}"


def assert_peft_runs_it(family: tiny_models.Family, base: Path, adapter: Path, tuned: Path) -> None:
    """PEFT, with the adapter on the base, says what the tuned model says."""
    plain = tiny_models.output_of(tiny_models.load(family, base), family.inputs())
    wanted = tiny_models.output_of(tiny_models.load(family, tuned), family.inputs())
    wrapped = PeftModel.from_pretrained(tiny_models.load(family, base), str(adapter)).eval()
    found = tiny_models.output_of(wrapped, family.inputs())
    assert float((plain - wanted).abs().max()) > 1e-2, "the change is to be seen"
    assert torch.allclose(found, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "bert classifier", "t5"])
def test_a_model_whose_matrices_moved_by_a_low_rank_is_recovered_by_peft_and_by_merge(
    name: str, tmp_path: Path
) -> None:
    family = tiny_models.FAMILIES[name]
    base = tiny_models.build_base(tmp_path / "base", family)
    tuned = moved(base, tmp_path / "tuned", shake)
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert report.totals.achieved < 1e-5
    assert not report.left_out
    assert_peft_runs_it(family, base, tmp_path / "out", tuned)
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_the_head_of_a_classifier_is_saved_whole_as_peft_does(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        num_labels=3,
    )
    family = tiny_models.Family(lambda: config, "RobertaForSequenceClassification", {})
    base = tiny_models.build_base(tmp_path / "base", family)
    tuned = moved(base, tmp_path / "tuned", shake)
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"
    assert "classifier" in config_of(tmp_path / "out")["modules_to_save"]
    assert {name for name in report.saved if "classifier" in name} == {
        f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    assert_peft_runs_it(family, base, tmp_path / "out", tuned)
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_a_bias_alone_brings_factors_of_zero(tmp_path: Path) -> None:
    family = tiny_models.FAMILIES["gpt2"]
    base = tiny_models.build_base(tmp_path / "base", family)

    def change(name: str, tensor: Tensor) -> Tensor | None:
        return shake(name, tensor) if name.endswith(("c_fc.bias", "c_attn.weight")) else None

    tuned = moved(base, tmp_path / "tuned", change)
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert set(report.modules) == {f"transformer.h.{n}.attn.c_attn.weight" for n in range(2)}
    assert not product(tmp_path / "out", "transformer.h.0.mlp.c_fc").any()
    assert config_of(tmp_path / "out")["bias"] == "lora_only"
    assert_peft_runs_it(family, base, tmp_path / "out", tuned)
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_weights_of_conv1d_are_turned_as_peft_has_them(tmp_path: Path) -> None:
    base = tiny_models.build_base(tmp_path / "base", tiny_models.FAMILIES["gpt2"])
    tuned = moved(base, tmp_path / "tuned", low_rank(3))
    extract(base, tuned, tmp_path / "out", rank=3, include=["attn"])
    found = factors(tmp_path / "out")
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True
    assert config_of(tmp_path / "out")["task_type"] == "CAUSAL_LM"
    assert found[f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"].shape == (3, 32)
    assert found[f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 3)
    name = "transformer.h.1.attn.c_proj.weight"  # square
    wanted = read_tensors(tuned)[name].double() - read_tensors(base)[name].double()
    assert torch.allclose(product(tmp_path / "out", name.removesuffix(".weight")).T, wanted, atol=1e-6)
    assert config_of(tmp_path / "out")["target_modules"] == [
        "c_attn",
        *(f"transformer.h.{n}.attn.c_proj" for n in range(2)),  # mlp.c_proj is not adapted
    ]


# One model has Conv1D or nn.MultiheadAttention; with both, PEFT 0.21 turns the matrices of the second as well.
@pytest.mark.parametrize("still", ["c_attn.", "attention."])
def test_layers_of_every_kind_are_recovered(still: str, tmp_path: Path) -> None:
    zoo = peft_zoo.make_zoo()
    base = peft_zoo.save_base(tmp_path / "base", zoo)
    whole = {"attention.in_proj_bias", "attention.out_proj.bias"}
    tuned = moved(base, tmp_path / "tuned", lambda n, t: None if n in whole or n.startswith(still) else shake(n, t))
    report = extract(base, tuned, tmp_path / "out", rank=2)
    layers = {"linear", "c_attn", "conv1", "conv2", "conv3", "head"} - {still.removesuffix(".")}
    assert set(report.saved) == {"norm.weight", "norm.bias", *(f"{layer}.bias" for layer in layers)}
    wrapped = PeftModel.from_pretrained(peft_zoo.make_zoo(), str(tmp_path / "out")).eval()
    with torch.inference_mode():
        found = wrapped(peft_zoo.TOKENS)
    assert torch.allclose(found, peft_zoo.output_of(read_tensors(tuned), zoo), atol=1e-5)
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_an_attention_whose_biases_moved_is_saved_whole_and_one_changed_matrix_brings_the_other(tmp_path: Path) -> None:
    zoo = peft_zoo.make_zoo()
    base = peft_zoo.save_base(tmp_path / "base", zoo)
    only = {"attention.in_proj_weight"}
    tuned = moved(base, tmp_path / "one", lambda n, t: shake(n, t) if n in only else None)
    extract(base, tuned, tmp_path / "a", rank=2)
    assert f"{PREFIX}attention.base_layer.out_proj.lora_A.weight" in factors(tmp_path / "a")
    wrapped = PeftModel.from_pretrained(peft_zoo.make_zoo(), str(tmp_path / "a")).eval()
    with torch.inference_mode():
        found = wrapped(peft_zoo.TOKENS)
    assert torch.allclose(found, peft_zoo.output_of(read_tensors(tuned), zoo), atol=1e-4)
    assert_merges_to(base, tmp_path / "a", tuned, tmp_path / "a-merged")
    both = {*only, "attention.in_proj_bias", "square.weight"}
    tuned = moved(base, tmp_path / "two", lambda n, t: shake(n, t) if n in both else None)
    report = extract(base, tuned, tmp_path / "b", rank=2)
    assert set(report.modules) == {"square.weight"}
    assert config_of(tmp_path / "b")["modules_to_save"] == ["attention"]
    assert_merges_to(base, tmp_path / "b", tuned, tmp_path / "b-merged")


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("shape", [(4, 24, 40), (4, 24, 24)])
def test_experts_in_one_tensor_are_recovered_the_way_round_peft_writes_them(
    model_type: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj": torch.randn(shape, generator=seeded(1)),
        f"{experts}.down_proj": torch.randn(shape[0], shape[2], shape[1], generator=seeded(2)),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(24, 24, generator=seeded(3)),
    }
    base = save_model(tmp_path / "base", tensors, {"model_type": model_type})
    deltas = {
        f"{experts}.{name}": torch.stack([planted(tensors[f"{experts}.{name}"][e], 2, e + 7) for e in range(4)])
        for name in ("gate_up_proj", "down_proj")
    }
    tuned = moved(base, tmp_path / "tuned", lambda n, t: deltas.get(n))
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert set(report.modules) == set(deltas)
    assert report.totals.achieved < 1e-5
    config, found = config_of(tmp_path / "out"), factors(tmp_path / "out")
    assert config["target_parameters"] == sorted(deltas)
    assert config["target_modules"] is None
    a = found[f"{PREFIX}{experts}.base_layer.lora_A.weight"].reshape(4, 2, -1)
    b = found[f"{PREFIX}{experts}.base_layer.lora_B.weight"].reshape(-1, 2, 4)
    each = torch.einsum("ore,eri->eoi", b.double(), a.double())
    wanted = deltas[f"{experts}.gate_up_proj"]
    assert torch.allclose(each.mT if model_type == "gpt_oss" else each, wanted, atol=1e-6)
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_peft_runs_extracted_experts_of_gpt_oss(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        eos_token_id=1,
        pad_token_id=0,
    )
    tokens = {"input_ids": torch.tensor([[5, 17, 3, 40, 41, 9, 2]])}
    family = tiny_models.Family(lambda: config, "GptOssForCausalLM", {}, lambda: tokens)
    base = tiny_models.build_base(tmp_path / "base", family)

    def change(name: str, tensor: Tensor) -> Tensor | None:
        if tensor.dim() == 3:
            return torch.stack([planted(tensor[e], 2, e + 3, 0.1) for e in range(3)])
        return planted(tensor, 2, len(name)) if tensor.dim() == 2 else None

    tuned = moved(base, tmp_path / "tuned", change)
    assert any(name.endswith("experts.gate_up_proj") for name in read_tensors(tuned))
    report = extract(base, tuned, tmp_path / "out", rank=2, exclude=["router", "_bias$"])
    assert any(name.endswith("experts.down_proj") for name in report.modules)
    aside = moved(base, tmp_path / "aside", lambda n, t: None if "router" in n or "_bias" in n else change(n, t))
    assert_peft_runs_it(family, base, tmp_path / "out", aside)
    assert_merges_to(base, tmp_path / "out", aside, tmp_path / "merged")


def test_files_cut_otherwise_and_other_dtypes_give_the_difference_of_the_values(tmp_path: Path) -> None:
    tensors = small(torch.bfloat16)
    base = save_model(tmp_path / "base", tensors, files=3)
    wide = {n: t.double() + planted(t, 4, len(n)) for n, t in tensors.items()}
    wide["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].double()
    tuned = save_model(tmp_path / "tuned", {n: t.float() for n, t in wide.items()}, files=2)
    report = extract(base, tuned, tmp_path / "out", rank=4)
    assert report.identical == 1  # the same values in another dtype
    assert report.dtype == "float32"
    name = "model.layers.0.self_attn.q_proj"
    wanted = wide[f"{name}.weight"] - tensors[f"{name}.weight"].double()
    assert torch.allclose(product(tmp_path / "out", name), wanted, atol=1e-6)


def test_what_is_identical_is_skipped_and_named_by_no_pattern_of_the_config(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", small())
    tuned = moved(base, tmp_path / "tuned", lambda n, t: planted(t, 2) if "layers.1.self_attn" in n else None)
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert report.identical == 3
    assert set(report.modules) == {"model.layers.1.self_attn.q_proj.weight"}
    assert config_of(tmp_path / "out")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    everywhere = moved(base, tmp_path / "every", lambda n, t: planted(t, 2) if "self_attn" in n else None)
    extract(base, everywhere, tmp_path / "short", rank=2)
    assert config_of(tmp_path / "short")["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_is_saved_whole(tied: bool, tmp_path: Path) -> None:
    family = tiny_models.FAMILIES["tied llama" if tied else "llama"]
    base = tiny_models.build_base(tmp_path / "base", family)

    def change(name: str, tensor: Tensor) -> Tensor | None:
        return planted(tensor, 2) if "q_proj" in name else None

    tuned = moved(base, tmp_path / "tuned", change)
    tensors = read_tensors(tuned)
    for name in [n for n in tensors if "embed_tokens" in n or "lm_head" in n]:
        tensors[name] = torch.cat([tensors[name], torch.ones(3, tensors[name].shape[1])])
    config = json.loads((base / "config.json").read_text())
    save_model(tuned, tensors, {**config, "vocab_size": config["vocab_size"] + 3})
    report = extract(base, tuned, tmp_path / "out", rank=2)
    assert "model.embed_tokens.weight" in report.saved
    assert "model.embed_tokens" in config_of(tmp_path / "out")["modules_to_save"]
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_auto_finds_the_planted_rank_under_the_noise_of_bfloat16(tmp_path: Path) -> None:
    moves, stays = (f"model.layers.{at}.mlp.up_proj.weight" for at in range(2))
    exact = {name: torch.randn(512, 384, generator=seeded(len(name))) * 0.02 for name in (moves, stays)}
    base = save_model(tmp_path / "base", {name: tensor.bfloat16() for name, tensor in exact.items()})
    after = exact[moves].bfloat16().double() + planted(exact[moves], 11, 3, 0.002)
    tuned = save_model(
        tmp_path / "tuned", {moves: after.bfloat16(), stays: exact[stays]}
    )  # all that differs is rounding
    report = extract(base, tuned, tmp_path / "out", rank="auto")
    layer = report.modules[moves]
    assert (layer.rank, layer.above_noise) == (11, 11)
    assert 0.05 < layer.relative < 0.2
    assert set(report.noise) == {stays}
    assert any("rounding" in note for note in map(str, report.notes))
    assert "noise only" in str(report)
    assert extract(base, tuned, tmp_path / "capped", max_rank=6).modules[moves].rank == 6


def spectrum(rows: int, columns: int, values: Tensor, seed: int = 5) -> Tensor:
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=seeded(seed), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=seeded(seed + 1), dtype=torch.float64)).Q
    found: Tensor = (left * values) @ right.T
    return found


def test_energy_keeps_the_smallest_rank_with_that_part(tmp_path: Path) -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    zero = {"a.q_proj.weight": torch.zeros(40, 30)}
    base = save_model(tmp_path / "base", zero)
    tuned = save_model(tmp_path / "tuned", {"a.q_proj.weight": spectrum(40, 30, values).float()})
    squares = values.square()
    for energy in (0.5, 0.9, 0.95, 0.99):
        wanted = int((squares.cumsum(0) / squares.sum() < energy - 1e-6).sum()) + 1
        found = extract(base, tuned, tmp_path / "out", energy=energy, dry_run=True)
        assert found.modules["a.q_proj.weight"].rank == wanted
    both = extract(base, tuned, tmp_path / "out", energy=0.99, rank=2, dry_run=True)
    assert both.modules["a.q_proj.weight"].rank == 2


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(600, 400), (400, 600), (1300, 300)])
def test_the_error_that_is_told_is_the_dense_error_and_next_to_the_least(
    exact: bool, dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    name = "m.q_proj"
    decaying = 1 / torch.arange(1, min(shape) + 1, dtype=torch.float64)
    weight = torch.randn(shape, generator=seeded(1)).float()
    after = (weight.double() + spectrum(*shape, decaying)).float()
    base, tuned = (
        save_model(tmp_path / "b", {f"{name}.weight": weight}),
        save_model(tmp_path / "t", {f"{name}.weight": after}),
    )
    report = extract(base, tuned, tmp_path / "out", rank=16, exact=exact, dtype=dtype)
    layer = report.modules[f"{name}.weight"]
    matrix = after.double() - weight.double()
    values = torch.linalg.svdvals(matrix)
    least = float(values[16:].square().sum().sqrt() / values.square().sum().sqrt())
    achieved = float((matrix - product(tmp_path / "out", name)).norm() / matrix.norm())
    assert layer.achieved == pytest.approx(achieved, rel=1e-5)
    assert layer.norm == pytest.approx(float(matrix.norm()), rel=1e-6)
    assert layer.relative == pytest.approx(float(matrix.norm() / weight.double().norm()), rel=1e-5)
    assert least * (1 - 1e-6) <= layer.predicted <= least * (1 + 1e-6 if exact else 1.003)
    assert report.totals.achieved == pytest.approx(layer.achieved)


@pytest.mark.parametrize("falling", [0.0, 0.1, 0.5])
def test_rank_64_is_next_to_the_least_error_where_the_spectrum_hardly_falls(falling: float, tmp_path: Path) -> None:
    """0: a difference that is noise and nothing else."""
    if falling:
        change = spectrum(1100, 700, torch.arange(1, 701, dtype=torch.float64) ** -falling)
    else:
        change = torch.randn(1100, 700, generator=seeded(5), dtype=torch.float64) / 700
    name = "m.q_proj.weight"
    base = save_model(tmp_path / "b", {name: torch.zeros(1100, 700)})
    tuned = save_model(tmp_path / "t", {name: change.float()})
    report = extract(base, tuned, tmp_path / "out", rank=64)
    values = torch.linalg.svdvals(change.float().double())
    least = float(values[64:].square().sum().sqrt() / values.square().sum().sqrt())
    assert report.modules[name].achieved <= 1.003 * least


SPECTRA: Mapping[str, Tensor] = {
    "slow": torch.arange(1, 301, dtype=torch.float64) ** -0.5,
    "fast, then flat": torch.exp(-torch.arange(300, dtype=torch.float64) / 8) + 1e-2,
    "sixteen over noise": torch.cat([torch.ones(16), torch.linspace(0.2, 0.01, 284)]).double(),
    "rank four": torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_sketch_comes_near_the_least_error_on_every_spectrum(name: str) -> None:
    class Held:
        def __init__(self, matrix: Tensor) -> None:
            self.matrix, self.shape, self.device = matrix, (matrix.shape[0], matrix.shape[1]), matrix.device

        def tiles(self) -> Iterator[tuple[int, Tensor]]:
            yield from ((at, self.matrix[at : at + 100]) for at in range(0, len(self.matrix), 100))

    matrix = spectrum(500, 300, SPECTRA[name]).float()
    found = sketch(Held(matrix), 12, 12, 2)
    values = torch.linalg.svdvals(matrix.double())
    least = float(values[12:].square().sum().sqrt() / values.square().sum().sqrt())
    error = float((matrix - found.found.product().matrix()).norm() / matrix.double().norm())
    assert error <= 1.003 * least + 1e-7
    assert found.error(12) == pytest.approx(error, rel=1e-5, abs=3e-7)  # less is rounding of float32


def test_a_matrix_that_is_read_again_for_every_pass_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model(tmp_path / "base", {"m.q_proj.weight": torch.randn(700, 400, generator=seeded(1))})
    tuned = moved(base, tmp_path / "tuned", lambda n, t: torch.randn(t.shape, generator=seeded(2)))
    first = extract(base, tuned, tmp_path / "held", rank=8)
    monkeypatch.setattr("loratool.reworking.extracting.extract.HELD", 0)
    monkeypatch.setattr("loratool.reworking.extracting.differences.TILE", 100_000)
    second = extract(base, tuned, tmp_path / "streamed", rank=8)
    assert second.totals.achieved == pytest.approx(first.totals.achieved, rel=1e-6)
    third = extract(base, tuned, tmp_path / "exact", rank=8, exact=True)
    assert third.totals.predicted <= second.totals.predicted * (1 + 1e-9)
    assert torch.allclose(product(tmp_path / "held", "m.q_proj"), product(tmp_path / "streamed", "m.q_proj"), atol=1e-4)


def test_include_and_exclude_choose_modules(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", small())
    tuned = moved(base, tmp_path / "tuned", low_rank(2))
    some = extract(base, tuned, tmp_path / "out", rank=2, include=[r"layers\.(0|1)\."], exclude=["up_proj$", "^x|s.1"])
    assert set(some.modules) == {"model.layers.0.self_attn.q_proj.weight"}
    assert some.excluded == 3
    with pytest.raises(UsageError, match="not a valid regular expression"):
        extract(base, tuned, tmp_path / "no", include=["(", "x"])
    with pytest.raises(UsageError, match="no module matches 'k_proj'"):
        extract(base, tuned, tmp_path / "no", exclude=["k_proj"])
    with pytest.raises(FitError, match="4 tensors that differ are excluded"):
        extract(base, tuned, tmp_path / "no", exclude=["proj"])
    assert not (tmp_path / "no").exists()


def test_a_pattern_that_takes_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.adapters.patterns.PATTERN_SECONDS", 0.5)
    base = save_model(tmp_path / "base", {f"{'a' * 60}.weight": torch.ones(3, 3)})
    tuned = save_model(tmp_path / "tuned", {f"{'a' * 60}.weight": torch.zeros(3, 3)})
    started = time.monotonic()
    with pytest.raises(UsageError, match="too long"):
        extract(base, tuned, tmp_path / "out", include=["(a+)+$x"])
    assert time.monotonic() - started < 5


def test_what_an_adapter_cannot_hold_is_told_with_the_reason(tmp_path: Path) -> None:
    tensors: Tensors = {
        **small(),
        "scale": torch.ones(3),
        "m.steps": torch.zeros(1, dtype=torch.int64),
        "old.weight": torch.ones(2, 2),
        "packed.weight": torch.ones(4, 4, dtype=torch.uint8),
        "outer.gate": torch.ones(5),
        "outer.layers.0.weight": torch.ones(4, 4),
    }
    base = save_model(tmp_path / "base", tensors)
    after = {n: (t.float() + 1).to(t.dtype) if t.dim() < 2 or n == "packed.weight" else t for n, t in tensors.items()}
    after["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] + 1
    after["new.weight"] = torch.ones(2, 2)
    after["score.weight"] = torch.ones(2, 64)
    del after["old.weight"]
    report = extract(base, save_model(tmp_path / "tuned", after), tmp_path / "out", rank=1)
    assert {name: reason.split(";")[0] for name, reason in report.left_out.items()} == {
        "scale": "it is not in a module, and PEFT saves only modules",
        "m.steps": "cannot compute with I64",
        "old.weight": "only BASE has it",
        "new.weight": "only TUNED has it",
        "packed.weight": "cannot compute with U8",
        "outer.gate": "PEFT would save all layers of its module with it",
    }
    assert report.saved == ("score.weight",)  # a new head
    assert "left out" in str(report)


def test_every_bad_input_gets_a_clear_answer_and_nothing_is_written(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", small())
    tuned = moved(base, tmp_path / "tuned", low_rank(2))
    names = list(small())
    broken = read_tensors(tuned)
    broken[names[0]][3, 4] = float("nan")
    broken[names[2]][0, 0] = float("inf")
    other = save_model(tmp_path / "other", {f"x.{n}": t for n, t in read_tensors(tuned).items()})
    extract(base, tuned, tmp_path / "adapter", rank=2)
    large = moved(base, tmp_path / "large", lambda n, t: planted(t, 2) * 1e12)
    vectors = save_model(tmp_path / "vectors", {**read_tensors(base), "n.norm.weight": torch.ones(4)})
    vectors_after = save_model(tmp_path / "vectors-after", {**read_tensors(base), "n.norm.weight": torch.zeros(4)})
    cases: list[tuple[type[LoratoolError], list[str], Callable[[], ExtractReport]]] = [
        (FitError, ["no tensor in common", "nearest in BASE"], lambda: extract(base, other, tmp_path / "out")),
        (FitError, ["are identical"], lambda: extract(base, base, tmp_path / "out")),
        (FitError, ["no matrix differs", "n.norm.weight"], lambda: extract(vectors, vectors_after, tmp_path / "out")),
        (
            InputError,
            [f"{names[0]} of TUNED", f"{names[2]} of TUNED", "NaN or infinite"],
            lambda: extract(base, save_model(tmp_path / "broken", broken), tmp_path / "out"),
        ),
        (InputError, ["TUNED must be a model"], lambda: extract(base, tmp_path / "adapter", tmp_path / "out")),
        (
            InputError,
            ["BASE must be a model"],
            lambda: extract(tmp_path / "adapter" / "adapter_model.safetensors", tuned, tmp_path / "out"),
        ),
        (
            UsageError,
            ["--rank must be auto or a whole number of at least 1 (got 0)"],
            lambda: extract(base, tuned, tmp_path / "out", rank=0),
        ),
        (
            UsageError,
            ["--rank must be auto or a whole number of at least 1 (got 'most')"],
            lambda: extract(base, tuned, tmp_path / "out", rank="most"),  # type: ignore[arg-type]
        ),
        (
            UsageError,
            ["--energy must be above 0 and at most 1 (got 0.0)"],
            lambda: extract(base, tuned, tmp_path / "out", energy=0.0),
        ),
        (
            UsageError,
            ["--energy must be above 0 and at most 1 (got 1.5)"],
            lambda: extract(base, tuned, tmp_path / "out", energy=1.5),
        ),
        (
            UsageError,
            ["--max-rank must be a whole number of at least 1 (got 0)"],
            lambda: extract(base, tuned, tmp_path / "out", max_rank=0),
        ),
        (UsageError, ["--dtype must be one of"], lambda: extract(base, tuned, tmp_path / "out", dtype="int8")),
        (UsageError, ["inside the input"], lambda: extract(base, tuned, base / "out")),
        (FitError, ["overflow float16"], lambda: extract(base, large, tmp_path / "out", dtype="float16")),
    ]
    for error, words, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_rank_above_what_a_shape_allows_is_capped(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"m.q_proj.weight": torch.zeros(30, 20), "m.score.weight": torch.zeros(3, 20)})
    tuned = moved(base, tmp_path / "tuned", lambda n, t: torch.randn(t.shape, generator=seeded(1)))
    report = extract(base, tuned, tmp_path / "out", rank=500)
    assert {name: layer.rank for name, layer in report.modules.items()} == {"m.q_proj.weight": 20, "m.score.weight": 3}
    assert config_of(tmp_path / "out")["rank_pattern"]
    assert_merges_to(base, tmp_path / "out", tuned, tmp_path / "merged")


def test_a_dry_run_tells_the_same_and_writes_nothing_and_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", small())
    tuned = moved(base, tmp_path / "tuned", lambda n, t: torch.randn(t.shape, generator=seeded(len(n))))
    steps: list[tuple[int, int]] = []
    dry = extract(base, tuned, tmp_path / "out", rank=4, dry_run=True, progress=lambda *s: steps.append(s))
    assert not (tmp_path / "out").exists()
    assert steps[-1] == (4, 4)
    wet = extract(base, tuned, tmp_path / "out", rank=4)
    assert wet.modules == dry.modules
    extract(base, tuned, tmp_path / "again", rank=4)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two
    origin = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert origin["base"]["files"]["model.safetensors"]["size"] == (base / "model.safetensors").stat().st_size
    assert "extracted into" in str(wet)
    assert "would write" in str(dry)


def test_files_of_image_models_in_gguf_keep_the_names_of_their_authors(tmp_path: Path) -> None:
    """llama.cpp's tables have no such architecture."""
    entries = (gguf_bytes.words("general.architecture", "flux"),)
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        weights = {"double_blocks.0.img_attn.proj.weight": np.full((8, 32), value, np.float32)}
        (tmp_path / f"flux-{name}.gguf").write_bytes(gguf_bytes.whole_file(entries, weights))
    report = loratool.extract(tmp_path / "flux-base.gguf", tmp_path / "flux-tuned.gguf", tmp_path / "out", rank=1)
    assert list(report.modules) == ["double_blocks.0.img_attn.proj.weight"]
