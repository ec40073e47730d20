"""A resized adapter is the nearest that its ranks allow, PEFT loads it, and nothing beside the factors is lost."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from expert_models import BOTH, FUSED, INPUTS, Layers
from oracle import picture, read_tensors, same_bits
from paths import REAL
from peft import AdaLoraConfig, HRAConfig, LoraConfig, PeftModel
from peft_files import edit_config, save_peft
from peft_zoo import TOKENS, Pair, make_zoo, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from workbench import Workbench

import loratool
from loratool.cli import run
from loratool.errors import FitError, InputError, UsageError

LAYERS = ["embed", "linear", "c_attn", "square", "conv1", "conv2", "conv3"]
LINEAR = ["linear", "c_attn", "square"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LAYERS[:-1]},
    "rsLoRA": {"target_modules": LAYERS[:-1], "use_rslora": True},
    "patterns": {
        "target_modules": LAYERS[:-1],
        "rank_pattern": {"conv.": 2, "^square": 5, "embed": 4},
        "alpha_pattern": {"c_attn": 1, "(linear|conv2)": 11},
    },
    "nn.MultiheadAttention": {"target_modules": ["attention"]},
    "DoRA": {"target_modules": LAYERS[:-1], "use_dora": True},
    "lora_bias": {"target_modules": ["linear", "c_attn", "conv1", "conv2"], "lora_bias": True},
    "trained biases": {"target_modules": LINEAR, "bias": "lora_only"},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["head", "norm"]},
    "trained tokens": {"target_modules": LINEAR, "trainable_token_indices": {"embed": [7, 2, 11]}},
}


def adapted(folder: Path, **settings: Any) -> Pair:
    return train(folder, make_zoo(), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LINEAR, **settings}))


def loaded(model: nn.Module, adapter: Path) -> Any:
    """The model with an adapter, as PEFT loads it; a key that is missing or unexpected is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    found = {key for key in load_file(adapter / "adapter_model.safetensors") if "lora_" in key}
    there = set(wrapped.state_dict())
    spelled = {
        key.replace("lora_embedding_A", "lora_embedding_A.default").replace(
            "lora_embedding_B", "lora_embedding_B.default"
        )
        for key in found
    }
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        spelled = {key.replace(f".{part}", f".{part}.default") for key in spelled}
    spelled = {key if not key.endswith("vector.default") else f"{key}.weight" for key in spelled}
    spelled = {f"{key}.default" if key.endswith("lora_E") else key for key in spelled}
    assert spelled <= there, spelled - there
    return wrapped


def merged_by_peft(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = loaded(model, adapter).merge_and_unload().state_dict()
    return merged


def deltas(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each tensor, in float64."""
    before = model.state_dict()
    return {n: (t.double() - before[n].double()) for n, t in merged_by_peft(model, adapter).items()}


def flat(delta: Tensor) -> Tensor:
    """A weight as the matrix that LoRA is low-rank in."""
    return delta.reshape(delta.shape[0], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_with_rank_enough_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    pair = adapted(tmp_path, **KINDS[kind])
    before = picture(pair.adapter)
    most = 4 if kind == "nn.MultiheadAttention" else 3
    report = loratool.resize(pair.adapter, tmp_path / "out", error=1e-7)
    assert report.totals.achieved < 1e-6
    assert max(layer.rank for layer in report.modules.values()) <= max(most, 5)
    wanted, found = merged_by_peft(make_zoo(), pair.adapter), merged_by_peft(make_zoo(), tmp_path / "out")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(make_zoo(), tmp_path / "out")(TOKENS), pair.output, rtol=1e-4, atol=1e-5)
    one, other = tmp_path / "one", tmp_path / "other"
    loratool.merge(pair.base, [pair.adapter], one)
    loratool.merge(pair.base, [tmp_path / "out"], other)
    for name, tensor in read_tensors(one).items():
        torch.testing.assert_close(read_tensors(other)[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
    assert picture(pair.adapter) == before


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "DoRA"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_smaller_rank_is_as_near_as_eckart_and_young_say_and_the_report_says_how_near(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    pair = adapted(tmp_path, **KINDS[kind])
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=1, dtype=dtype)
    before, after = deltas(make_zoo(), pair.adapter), deltas(make_zoo(), tmp_path / "out")
    for target, layer in report.modules.items():
        dense = flat(before[target].T if "c_attn" in target else before[target])
        values = torch.linalg.svdvals(dense)
        best = float(values[1:].norm() / values.norm())
        # PEFT adds in float32
        assert layer.predicted == pytest.approx(best, rel=1e-4, abs=2e-6), target
        left = float((before[target] - after[target]).norm() / before[target].norm())
        assert layer.achieved == pytest.approx(left, rel=1e-4, abs=2e-6), target
        twice = 2 if target == "attention.out_proj.weight" else 1  # PEFT applies it twice; its norm is that of both
        assert layer.norm == pytest.approx(float(dense.norm()), rel=1e-4), twice
        assert layer.rank == 1
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = {n: t for n, t in tensors.items() if ".lora_" in n and "bias" not in n}
    assert {str(t.dtype) for t in factors.values()} == {f"torch.{dtype}"}


def formula(adapter: Path) -> dict[str, Tensor]:
    """α/r·BA of linear layers, from the files, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in (n for n in tensors if n.endswith("lora_A.weight")):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = tensors[name].shape[0]
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        product = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        found[module] = product * (alpha / rank)
    return found


def write(folder: Path, rank: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter of two layers with falling singular values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, rows, columns in (("model.q", 60, 50), ("model.v", 40, 70)):
        spread = 0.7 ** torch.arange(rank).float()[:, None]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * spread
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return save_peft(
        folder, {n: t.to(dtype) for n, t in tensors.items()}, r=rank, lora_alpha=2 * rank, target_modules=["q", "v"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reported_errors_are_those_of_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", dtype=dtype)
    report = loratool.resize(adapter, tmp_path / "out", rank=5)
    before, after = formula(adapter), formula(tmp_path / "out")
    for module, dense in before.items():
        layer = report.modules[f"{module}.weight"]
        values = torch.linalg.svdvals(dense)
        assert layer.predicted == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-6)
        assert layer.achieved == pytest.approx(float((dense - after[module]).norm() / dense.norm()), rel=1e-5)
    whole = torch.cat([dense.flatten() for dense in before.values()])
    left = torch.cat([(dense - after[m]).flatten() for m, dense in before.items()])
    assert report.totals.norm == pytest.approx(float(whole.norm()), rel=1e-9)
    assert report.totals.achieved == pytest.approx(float(left.norm() / whole.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"energy": 0.95}, lambda values, k: (values[:k] ** 2).sum() >= 0.95 * (values**2).sum() * (1 - 1e-9)),
        ({"error": 0.2}, lambda values, k: values[k:].norm() <= 0.2 * values.norm() * (1 + 1e-9)),
        ({"ratio": 5}, lambda values, k: bool(values[k - 1] > values[0] / 5)),
    ],
    ids=["energy", "error", "ratio"],
)
def test_rules_hold_on_the_dense_update(
    rule: dict[str, Any], holds: Callable[[Tensor, int], bool], tmp_path: Path
) -> None:
    adapter = write(tmp_path / "adapter")
    report = loratool.resize(adapter, tmp_path / "out", **rule)
    for module, dense in formula(adapter).items():
        values, rank = torch.linalg.svdvals(dense), report.modules[f"{module}.weight"].rank
        assert holds(values, rank)
        fewer = rank - 1 if "ratio" not in rule else rank + 1
        assert not holds(values, fewer)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_alpha_is_the_rank_and_patterns_say_where_it_differs(tmp_path: Path) -> None:
    pair = adapted(tmp_path, use_rslora=True, rank_pattern={"square": 6})
    loratool.resize(pair.adapter, tmp_path / "out", energy=0.999)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in LINEAR:
        rank = tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
    assert config["use_rslora"] is False


def test_uniform_writes_one_rank_and_no_patterns(tmp_path: Path) -> None:
    pair = adapted(tmp_path, rank_pattern={"square": 6, "linear": 1})
    report = loratool.resize(pair.adapter, tmp_path / "out", energy=0.9999, uniform=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (rank,) = {layer.rank for layer in report.modules.values()}
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    for name, tensor in deltas(make_zoo(), pair.adapter).items():
        found = deltas(make_zoo(), tmp_path / "out")[name]
        assert float((found - tensor).norm()) <= 0.011 * float(tensor.norm()) + 1e-6


def test_a_larger_rank_is_filled_up_with_zeros(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    report = loratool.resize(adapter, tmp_path / "out", rank=20)
    assert report.totals.achieved < 1e-6
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.q.lora_A.weight"].shape == (20, 50)
    assert not bool(tensors["base_model.model.model.q.lora_A.weight"][12:].any())
    for module, dense in formula(adapter).items():
        torch.testing.assert_close(formula(tmp_path / "out")[module], dense, rtol=0, atol=1e-5)


def test_a_budget_is_kept_and_what_it_leaves_out_is_no_target_any_more(tmp_path: Path) -> None:
    pair = adapted(tmp_path, target_modules=LINEAR)
    report = loratool.resize(pair.adapter, tmp_path / "out", budget=60)
    assert report.totals.parameters <= 60
    assert report.dropped
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {t.removesuffix(".weight") for t in report.modules}
    found, before = deltas(make_zoo(), tmp_path / "out"), deltas(make_zoo(), pair.adapter)
    left = torch.cat([(before[f"{m}.weight"] - found[f"{m}.weight"]).flatten() for m in LINEAR]).norm()
    whole = torch.cat([before[f"{m}.weight"].flatten() for m in LINEAR]).norm()
    assert report.totals.achieved == pytest.approx(float(left / whole), rel=1e-4)


def test_experts_are_resized_together_and_peft_loads_them(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Layers(FUSED, False).eval()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=BOTH)
    pair = train(tmp_path, model, config, INPUTS)
    for rank, worst in ((2, 1e-5), (1, 1.0)):
        out = tmp_path / str(rank)
        report = loratool.resize(pair.adapter, out, rank=rank)
        found, before = deltas(model, out), deltas(model, pair.adapter)
        for target, layer in report.modules.items():
            best = torch.stack([torch.linalg.svdvals(d)[rank:].norm() for d in before[target]]).norm()
            left = (before[target] - found[target]).norm()
            assert float(left) == pytest.approx(float(best), rel=1e-4, abs=1e-5)
            assert layer.achieved <= worst
        loratool.merge(pair.base, [out], tmp_path / f"merged {rank}")


def test_a_pruned_adalora_becomes_plain_lora(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, r=4, target_r=2, lora_alpha=6, target_modules=["linear", "square"], total_step=9)
    pair = train(tmp_path, make_zoo(), config)
    loratool.resize(pair.adapter, tmp_path / "out", rank=4)
    wanted = deltas(make_zoo(), pair.adapter)
    for name, found in deltas(make_zoo(), tmp_path / "out").items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=2e-6)


def test_a_calibration_minimises_the_error_of_the_outputs(tmp_path: Path) -> None:
    """As whitening the dense update with the second moment of the inputs does (SVD-LLM)."""
    adapter = write(tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    grams, inputs = {}, {}
    for module, columns in (("model.q", 50), ("model.v", 70)):
        spread = torch.logspace(0, -3, columns, dtype=torch.float64)
        x = torch.randn(500, columns, generator=generator, dtype=torch.float64) * spread
        z = x @ tensors[f"base_model.model.{module}.lora_A.weight"].double().T
        grams[module], inputs[f"{module}"] = (z.T @ z / 500).float(), x
    save_file(grams, tmp_path / "calibration.safetensors")
    report = loratool.resize(adapter, tmp_path / "out", rank=3, calibration=tmp_path / "calibration.safetensors")
    plain = loratool.resize(adapter, tmp_path / "plain", rank=3)
    before, after, without = formula(adapter), formula(tmp_path / "out"), formula(tmp_path / "plain")
    for module, x in inputs.items():
        outputs = x @ before[module].T
        values = torch.linalg.svdvals(outputs)
        best = float(values[3:].norm() / values.norm())
        left = float((outputs - x @ after[module].T).norm() / outputs.norm())
        layer = report.modules[f"{module}.weight"]
        assert left == pytest.approx(best, rel=1e-3)
        assert layer.activations == pytest.approx(best, rel=1e-3)
        assert left < float((outputs - x @ without[module].T).norm() / outputs.norm())
        dense = before[module]
        assert layer.predicted == pytest.approx(float((dense - after[module]).norm() / dense.norm()), rel=1e-4)
        assert layer.predicted >= plain.modules[f"{module}.weight"].predicted


def test_what_is_beside_the_factors_is_carried_over_bit_for_bit(tmp_path: Path) -> None:
    pair = adapted(
        tmp_path, target_modules=LINEAR, modules_to_save=["head"], trainable_token_indices={"embed": [7, 2]}, bias="all"
    )
    (pair.adapter / "tokenizer.json").write_text("{}")
    (pair.adapter / "optimizer.pt").write_text("not this")
    loratool.resize(pair.adapter, tmp_path / "out", rank=1)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (pair.adapter, tmp_path / "out"))
    whole = {n for n in before if "lora_" not in n and "original_module" not in n and "modules_to_save" not in n}
    assert whole
    for name in whole:
        assert torch.equal(after[name], before[name]), name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [
            *("adapter_config.json", "adapter_model.safetensors", "loratool.json", "tokenizer.json"),
            *(["README.md"] if (pair.adapter / "README.md").exists() else []),
        ]
    )
    made = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert made["made_by"] == "loratool resize"
    assert made["rule"] == "rank 1"
    assert list(tmp_path.glob("*.partial")) == []


def test_the_same_call_gives_the_same_bytes_and_a_dry_run_the_same_numbers(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    dry = loratool.resize(adapter, tmp_path / "out", energy=0.9, dry_run=True)
    assert not (tmp_path / "out").exists()
    one = loratool.resize(adapter, tmp_path / "out", energy=0.9)
    loratool.resize(adapter, tmp_path / "again", energy=0.9)
    assert dry.modules == one.modules
    assert (dry.written, one.written) == (False, True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    loratool.resize(adapter, tmp_path / "out", rank=4)
    with pytest.raises(UsageError, match="--overwrite"):
        loratool.resize(adapter, tmp_path / "out", rank=2)
    loratool.resize(adapter, tmp_path / "out", rank=2, overwrite=True)
    assert (
        load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.model.q.lora_A.weight"].shape[0]
        == 2
    )


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.resize(adapter, tmp_path / "out", rank=2, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_of_dora_it_is_said_what_the_error_means(tmp_path: Path) -> None:
    pair = adapted(tmp_path, use_dora=True)
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=1)
    assert any("DoRA" in note for note in map(str, report.notes))


def spoiled(adapter: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    path = adapter / "adapter_model.safetensors"
    save_file(dict(change(load_file(path))), path)
    return adapter


def set_config(adapter: Path, **fields: Any) -> Path:
    edit_config(adapter, **fields)
    return adapter


def refused(adapter: Path, out: Path, kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        loratool.resize(adapter, out, **{"rank": 2, **options})
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return str(caught.value)


def test_adapters_that_are_not_low_rank_are_refused_with_a_way_out(tmp_path: Path) -> None:
    pissa = set_config(write(tmp_path / "pissa"), init_lora_weights="pissa")
    assert "loratool extract BASE MERGED -o LORA" in refused(pissa, tmp_path / "out", InputError)
    pair = train(tmp_path / "hra", make_zoo(), HRAConfig(r=2, target_modules=["linear"]))
    assert "loratool extract BASE MERGED -o LORA" in refused(pair.adapter, tmp_path / "out", InputError)


def test_values_that_are_no_numbers_are_named_all_of_them(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["base_model.model.model.q.lora_A.weight"][0, 0] = float("nan")
        tensors["base_model.model.model.v.lora_B.weight"][3, 1] = float("inf")
        return tensors

    message = refused(spoiled(write(tmp_path / "adapter"), spoil), tmp_path / "out", InputError)
    assert "model.q.lora_A.weight" in message
    assert "model.v.lora_B.weight" in message


def test_an_untrained_adapter_is_refused(tmp_path: Path) -> None:
    adapter = spoiled(write(tmp_path / "adapter"), lambda ts: {n: t * ("lora_A" in n) for n, t in ts.items()})
    for rule in ({"rank": 2}, {"rank": None, "energy": 0.9}):
        assert "every update is zero" in refused(adapter, tmp_path / "out", FitError, **rule)


def test_a_layer_that_is_zero_beside_others_is_told_and_kept(tmp_path: Path) -> None:
    adapter = spoiled(write(tmp_path / "adapter"), lambda ts: {n: t * ("v.lora_B" not in n) for n, t in ts.items()})
    report = loratool.resize(adapter, tmp_path / "out", energy=0.9)
    assert any("updates are zero: model.v.weight" in note for note in map(str, report.notes))
    assert report.modules["model.v.weight"].rank == 1
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


def test_factors_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    adapter = spoiled(write(tmp_path / "adapter"), lambda ts: {n: t * 1e6 for n, t in ts.items()})
    assert "overflow float16" in refused(adapter, tmp_path / "out", FitError, dtype="float16")


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    adapter = spoiled(write(tmp_path / "adapter"), lambda ts: {**ts, "base_model.model.q.lora_X.weight": torch.ones(2)})
    assert "lora_X" in refused(adapter, tmp_path / "out", FitError)


@pytest.mark.parametrize(
    ("grams", "told"),
    [
        ({"model.q": torch.eye(12)}, "model.v: missing"),
        ({"model.q": torch.eye(12), "model.v": torch.eye(11)}, "expected floats of shape 12 × 12"),
        (
            {"model.q": torch.eye(12), "model.v": torch.eye(12), "model.x": torch.eye(2)},
            "model.x: the adapter has no such module",
        ),
        ({"model.q": torch.eye(12), "model.v": torch.ones(12, 12).triu()}, "model.v: is not symmetric"),
        ({"model.q": torch.eye(12), "model.v": torch.eye(12) * float("nan")}, "model.v: contains NaN"),
    ],
)
def test_a_calibration_of_something_else_is_refused(grams: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    save_file(grams, tmp_path / "c.safetensors")
    message = refused(write(tmp_path / "adapter"), tmp_path / "out", InputError, calibration=tmp_path / "c.safetensors")
    assert told in message


def test_a_rank_above_that_of_every_layer_is_noted(tmp_path: Path) -> None:
    """The update stays what it was and the file grows, which somebody who types --rank 64 may not expect."""
    adapter = write(tmp_path / "adapter")
    most = max(layer.rank for layer in loratool.resize(adapter, tmp_path / "same", error=1e-7).modules.values())
    for rank, noted in ((most + 2, True), (1, False)):
        report = loratool.resize(adapter, tmp_path / f"rank-{rank}", rank=rank)
        assert ("rank-not-needed" in {note.code for note in report.notes}) == noted


def test_the_command_s_refusals_have_the_contract_s_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Workbench(tmp_path / "bench", capsys)
    adapter = write(bench.inputs / "other")
    for options, told, code in (
        ([], "one of --rank", 2),
        (["--rank", "2", "--energy", "0.9"], "--rank and --energy", 2),
        (["--rank", "0"], "a whole number of at least 1", 2),
        (["--energy", "2"], "--energy must be above 0 and at most 1 (got 2)", 2),
        (["--energy", "90"], "--energy must be above 0 and at most 1 (got 90); did you mean 0.9?", 2),
        (["--budget", "9"], "is too small: even rank 1", 2),
        (["--rank", "2", "--calibration", str(tmp_path / "nowhere")], "no such file", 3),
        (["--budget", "99999", "--layer-weights", str(adapter / "adapter_model.safetensors")], "not UTF-8", 3),
    ):
        bench.refuses("resize", adapter, "-o", bench.out, *options, told=[told], code=code)
    bench.refuses("resize", adapter, "-o", adapter / "inside", "--rank", "2", told=["loratool never writes to"], code=2)
    bench.refuses("resize", bench.inputs / "nowhere", "-o", bench.out, "--rank", "2", told=["no such file"], code=3)
    assert bench.run("resize", adapter, "-o", bench.out, "--rank", "2", "-q").out == ""


@pytest.mark.skipif(not REAL.is_dir(), reason="the published adapters are not here")
@pytest.mark.parametrize("name", ["gpt2-kto-trl", "roberta-adalora", "ih-tinygpt2-rank-gt-dim"])
def test_published_adapters_are_cut_as_their_dense_updates_are(name: str, tmp_path: Path) -> None:
    shutil.copytree(REAL / name, tmp_path / "adapter")
    report = loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=2)
    tensors = load_file(REAL / name / "adapter_model.safetensors")
    config = json.loads((REAL / name / "adapter_config.json").read_text())
    found = formula(tmp_path / "out")
    for module in list(found)[:3]:
        start = f"base_model.model.{module}.lora_"
        end = "" if "init_r" in config else ".weight"
        a, b = tensors[f"{start}A{end}"].double(), tensors[f"{start}B{end}"].double()
        scale = config["lora_alpha"] / (config["r"] if end else config["init_r"] + 1e-5)
        dense = scale * b @ (a * tensors[f"{start}E"].double() if not end else a)
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        cut = (u[:, :2] * s[:2]) @ vt[:2]
        assert float((found[module] - cut).norm()) <= 1e-3 * float(dense.norm())
        assert report.modules[f"{module}.weight"].predicted == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-6)


# ---- every kind of layer, with PEFT's own delta in float64 as the oracle ----

EVERY: dict[str, dict[str, Any]] = {**KINDS, "conv3": {"target_modules": ["conv3", "conv1"]}}


def unmerged(model: nn.Module) -> nn.Module:
    """In place of merging: PEFT cannot merge into a Conv3d whose kernel is not cubic."""
    return model


def of_kind(folder: Path, kind: str) -> Pair:
    if kind == "AdaLoRA":
        config: Any = AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, target_modules=["linear", "square"], total_step=9
        )
        return train(folder, make_zoo(), config)
    settings = {"r": 3, "lora_alpha": 5, **EVERY[kind]}
    zoo = make_zoo()
    merge = (lambda _: unmerged(make_zoo())) if kind == "conv3" else None
    return train(folder, zoo, LoraConfig(**settings), merge=merge)


def exact_deltas(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """α/r·BA of every layer that PEFT wraps, in float64, by target: (experts, rows, columns), or (1, …) of matrices."""
    found: dict[str, Tensor] = {}
    for name, module in loaded(model, adapter).double().named_modules():
        scaling = getattr(module, "scaling", {}).get("default")
        if scaling is None:
            continue
        target = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", None)
        if parameter is not None:
            delta = module.get_delta_weight("default")
            found[f"{target}.{parameter}"] = delta
            continue
        if len(module.lora_embedding_A):
            down, up = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        elif isinstance(module.lora_A["default"], nn.Parameter):  # AdaLoRA
            down, up = module.lora_E["default"] * module.lora_A["default"], module.lora_B["default"]
            scaling /= float(module.ranknum["default"]) + 1e-5
        else:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        tail = "in_proj_weight" if isinstance(module.get_base_layer(), nn.MultiheadAttention) else "weight"
        found[f"{target}.{tail}"] = (scaling * up.flatten(1) @ down.flatten(1))[None]
    return {target: delta.detach() for target, delta in found.items()}


def tails(delta: Tensor, rank: int) -> float:
    """The least ‖ΔW − ΔW'‖ / ‖ΔW‖ of a rank."""
    values = torch.linalg.svdvals(delta)
    return float(values[:, rank:].norm() / values.norm())


def stored_as(adapter: Path, dtype: torch.dtype) -> Path:
    return spoiled(adapter, lambda ts: {n: t.to(dtype) if ".lora_" in n else t for n, t in ts.items()})


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [*EVERY, "AdaLoRA"])
def test_predicted_and_achieved_errors_are_those_of_the_dense_updates_of_every_kind(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pair = of_kind(tmp_path, kind)
    before_files = picture(stored_as(pair.adapter, dtype))
    before = exact_deltas(make_zoo(), pair.adapter)
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=2)
    after = exact_deltas(make_zoo(), tmp_path / "out")
    assert set(report.modules) == set(before) == set(after)
    squares = 0.0
    for target, layer in report.modules.items():
        best = tails(before[target], 2)
        left = float((before[target] - after[target]).norm() / before[target].norm())
        assert layer.predicted == pytest.approx(best, rel=1e-6, abs=1e-9), target
        assert layer.achieved == pytest.approx(left, rel=1e-5, abs=1e-9), target
        squares += (left * layer.norm) ** 2
        if dtype == torch.float32:
            assert left == pytest.approx(best, rel=1e-6, abs=3e-7), target
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.totals.achieved * report.totals.norm == pytest.approx(squares**0.5, rel=1e-5, abs=1e-9)
    assert picture(pair.adapter) == before_files


@pytest.mark.parametrize("rank", [4, 7])
@pytest.mark.parametrize("kind", [*EVERY, "AdaLoRA"])
def test_a_rank_that_is_enough_or_more_loses_nothing_of_any_kind(kind: str, rank: int, tmp_path: Path) -> None:
    pair = of_kind(tmp_path, kind)
    rank = max(rank, 5) if kind == "patterns" else rank  # which has a layer of rank 5
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=rank, uniform=True)
    before, after = exact_deltas(make_zoo(), pair.adapter), exact_deltas(make_zoo(), tmp_path / "out")
    for target, delta in before.items():
        assert float((after[target] - delta).norm()) <= 5e-7 * float(delta.norm()), target
        assert report.modules[target].rank == rank
    with torch.inference_mode():
        found = loaded(make_zoo(), tmp_path / "out")(TOKENS)
    torch.testing.assert_close(found, pair.output, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", rank, rank, False)
    loratool.merge(pair.base, [tmp_path / "out"], tmp_path / "merged")


def experts(folder: Path, **settings: Any) -> tuple[nn.Module, Pair]:
    torch.manual_seed(5)
    model = Layers(FUSED, False).eval()
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": BOTH, **settings})
    return model, train(folder, model, config, INPUTS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}], ids=str)
def test_errors_of_experts_are_those_of_their_dense_updates(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, pair = experts(tmp_path, **settings)
    stored_as(pair.adapter, dtype)
    before = exact_deltas(model, pair.adapter)
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=2)
    after = exact_deltas(model, tmp_path / "out")
    assert set(report.modules) == set(before) == set(after)
    for target, layer in report.modules.items():
        assert layer.predicted == pytest.approx(tails(before[target], 2), rel=1e-6), target
        left = float((before[target] - after[target]).norm() / before[target].norm())
        assert layer.achieved == pytest.approx(left, rel=1e-5), target
        assert layer.norm == pytest.approx(float(before[target].norm()), rel=1e-6)
    with torch.inference_mode():
        loratool.resize(pair.adapter, tmp_path / "same", rank=3)
        if dtype == torch.float32:
            torch.testing.assert_close(loaded(model, tmp_path / "same")(INPUTS), pair.output, rtol=1e-4, atol=1e-5)


def test_experts_that_a_budget_leaves_out_are_no_target_any_more(tmp_path: Path) -> None:
    model, pair = experts(tmp_path)
    before = exact_deltas(model, pair.adapter)
    for budget in (60, 120, 180, 300):
        out = tmp_path / str(budget)
        report = loratool.resize(pair.adapter, out, budget=budget)
        after = exact_deltas(model, out)
        assert set(after) == set(report.modules)
        assert set(before) - set(after) == set(report.dropped)
        assert report.totals.parameters <= budget
        left = sum(float((d - after.get(t, torch.zeros_like(d))).norm() ** 2) for t, d in before.items())
        whole = sum(float(d.norm() ** 2) for d in before.values())
        assert report.totals.achieved == pytest.approx((left / whole) ** 0.5, rel=1e-5)


def rewritten(folder: Path, **tensors: Tensor) -> Path:
    save_file({n.replace("__", "."): t.contiguous().clone() for n, t in tensors.items()}, folder)
    return folder


@pytest.mark.parametrize("one_for_all", [False, True], ids=["a Gram for each expert", "a Gram for all"])
def test_a_calibration_of_experts_whitens_each_dense_update(one_for_all: bool, tmp_path: Path) -> None:
    model, pair = experts(tmp_path)
    before = exact_deltas(model, pair.adapter)
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    prefix = "base_model.model."
    grams, roots = {}, {}
    generator = torch.Generator().manual_seed(1)
    for target in before:
        module = target.rpartition(".")[0]
        nested = f"{prefix}{module}.base_layer.lora_A.weight"
        outer = f"{prefix}{module}.lora_A.weight"
        found = [n for n in (outer, nested) if tensors[n].shape[1] == before[target].shape[-1]]
        (name,) = found
        a = tensors[name].double().reshape(4, 3, -1)
        columns = a.shape[-1]
        if one_for_all:  # E[zzᵀ] = I for all of them, whatever inputs do that
            grams[target] = torch.eye(3).double() * 2
            roots[target] = torch.linalg.pinv(a) @ (torch.eye(3).double() * 2**0.5)
        else:
            half = torch.randn(4, columns, columns, generator=generator, dtype=torch.float64)
            grams[target], roots[target] = a @ half @ half.mT @ a.mT, half
    rewritten(tmp_path / "c.safetensors", **{t.replace(".", "__"): g for t, g in grams.items()})
    report = loratool.resize(pair.adapter, tmp_path / "out", rank=1, calibration=tmp_path / "c.safetensors")
    after = exact_deltas(model, tmp_path / "out")
    for target, delta in before.items():
        outputs = delta @ roots[target]
        left = float(((delta - after[target]) @ roots[target]).norm() / outputs.norm())
        assert left == pytest.approx(tails(outputs, 1), rel=1e-5), target
        assert report.modules[target].activations == pytest.approx(left, rel=1e-5)


# ---- rules, on the dense update ----


def calibrated(folder: Path, adapter: Path, seed: int = 3, rank: int | None = None) -> tuple[Path, dict[str, Tensor]]:
    """A calibration of a written adapter, and the square roots of the (in, in) second moments behind it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    grams, roots = {}, {}
    for module, columns in (("model.q", 50), ("model.v", 70)):
        spread = torch.logspace(0, -2, columns, dtype=torch.float64)[:, None]
        half = torch.randn(columns, rank or columns, generator=generator, dtype=torch.float64) * spread
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        grams[module], roots[module] = a @ half @ half.T @ a.T, half
    save_file(grams, folder / "calibration.safetensors")
    return folder / "calibration.safetensors", roots


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.25}, {"rank": 4}], ids=str)
def test_with_a_calibration_rules_are_of_the_whitened_dense_update(rule: dict[str, Any], tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    calibration, roots = calibrated(tmp_path, adapter)
    report = loratool.resize(adapter, tmp_path / "out", calibration=calibration, **rule)
    before, after = formula(adapter), formula(tmp_path / "out")
    for module, half in roots.items():
        layer = report.modules[f"{module}.weight"]
        outputs = before[module] @ half
        allowed = rule.get("error") or (1 - rule["energy"]) ** 0.5 if "rank" not in rule else None
        if allowed is not None:
            assert tails(outputs[None], layer.rank) <= allowed < tails(outputs[None], layer.rank - 1)
        left = float(((before[module] - after[module]) @ half).norm() / outputs.norm())
        assert left == pytest.approx(tails(outputs[None], layer.rank), rel=1e-5)
        assert layer.activations == pytest.approx(left, rel=1e-5)
        dense = float((before[module] - after[module]).norm() / before[module].norm())
        assert layer.achieved == pytest.approx(dense, rel=1e-5)


def test_with_rank_enough_nothing_is_lost_whatever_the_calibration_saw(tmp_path: Path) -> None:
    """A few inputs leave E[zzᵀ] singular: what they never asked for is kept where there is room."""
    adapter = write(tmp_path / "adapter", rank=6)
    calibration, _ = calibrated(tmp_path, adapter, rank=2)
    report = loratool.resize(adapter, tmp_path / "out", rank=6, calibration=calibration)
    assert report.totals.achieved < 1e-6
    for module, dense in formula(adapter).items():
        torch.testing.assert_close(formula(tmp_path / "out")[module], dense, rtol=0, atol=1e-4)


def test_totals_of_a_calibrated_budget_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    rewritten(tmp_path / "c.safetensors", model__q=torch.eye(12) * 4, model__v=torch.eye(12) * 0.001)
    report = loratool.resize(adapter, tmp_path / "out", budget=440, calibration=tmp_path / "c.safetensors")
    assert report.dropped == ("model.v.weight",)
    before, after = formula(adapter), formula(tmp_path / "out")
    whole = sum(float(d.norm() ** 2) for d in before.values()) ** 0.5
    left = float((before["model.q"] - after["model.q"]).norm() ** 2 + before["model.v"].norm() ** 2) ** 0.5
    assert report.totals.norm == pytest.approx(whole, rel=1e-6)
    assert report.totals.achieved == pytest.approx(left / whole, rel=1e-5)


@pytest.mark.parametrize("rule", [{"energy": 1.0}, {"error": 0.0}, {"ratio": 1e9}, {"budget": "1G"}], ids=str)
def test_what_is_rounding_only_is_no_rank(rule: dict[str, Any], tmp_path: Path) -> None:
    """Every direction twice over: 12 columns of a matrix of rank 6."""

    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat([t, t], 0 if "lora_A" in n else 1) for n, t in tensors.items()}

    adapter = set_config(spoiled(write(tmp_path / "adapter", rank=6), twice), r=12)
    report = loratool.resize(adapter, tmp_path / "out", **rule)
    assert {layer.rank for layer in report.modules.values()} == {6}
    assert report.totals.achieved < 1e-6


@pytest.mark.parametrize("budget", [150, 400, 700, 1300, 10_000])
def test_a_budget_is_spent_as_well_as_any_ranks_spend_it(budget: int, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")  # both layers have 110 numbers a rank, so the best is reached
    report = loratool.resize(adapter, tmp_path / "out", budget=budget)
    before, after = formula(adapter), formula(tmp_path / "out")
    values = {module: torch.linalg.svdvals(d)[:12].square() for module, d in before.items()}
    best = min(
        float(values["model.q"][i:].sum() + values["model.v"][j:].sum())
        for i in range(13)
        for j in range(13)
        if 110 * (i + j) <= budget
    )
    left = sum(float((d - after.get(m, torch.zeros_like(d))).norm() ** 2) for m, d in before.items())
    assert left == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert report.totals.parameters <= budget


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_budget_of_bytes_is_that_of_the_factors_in_the_file(dtype: str, tmp_path: Path) -> None:
    report = loratool.resize(write(tmp_path / "adapter"), tmp_path / "out", budget="2kB", dtype=dtype)
    stored = sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )
    assert stored == report.totals.bytes <= 2000
    assert report.totals.bytes > 2000 - 110 * 4
    assert (report.totals.parameters_before, report.totals.bytes_before) == (2 * 12 * 110, 2 * 12 * 110 * 4)


def test_weights_of_layers_decide_where_a_budget_goes(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    for name, other in (("q", "v"), ("v", "q")):
        report = loratool.resize(adapter, tmp_path / name, budget=660, layer_weights={rf"model\.{name}": 1e6})
        assert {t: layer.rank for t, layer in report.modules.items()} == {f"model.{name}.weight": 6}
        assert report.dropped == (f"model.{other}.weight",)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"] == [f"model.{name}"]


@pytest.mark.parametrize("budget", [100, 300, 500])
def test_a_budget_is_a_ceiling_also_where_an_attention_has_one_rank_for_two_weights(
    budget: int, tmp_path: Path
) -> None:
    pair = adapted(tmp_path, target_modules=["attention", "linear"])
    report = loratool.resize(pair.adapter, tmp_path / "out", budget=budget)
    assert report.totals.parameters <= budget
    exact_deltas(make_zoo(), tmp_path / "out")


@pytest.mark.parametrize("budget", [400, 600, 850])
def test_a_budget_is_a_ceiling_also_with_uniform(budget: int, tmp_path: Path) -> None:
    report = loratool.resize(write(tmp_path / "adapter"), tmp_path / "out", budget=budget, uniform=True)
    assert report.totals.parameters <= budget
    assert len({layer.rank for layer in report.modules.values()}) == 1


# ---- layers that are left out, and what stands beside them ----


def test_a_layer_that_is_left_out_keeps_its_trained_bias(tmp_path: Path) -> None:
    pair = adapted(tmp_path, **KINDS["trained biases"])
    report = loratool.resize(pair.adapter, tmp_path / "out", budget=60)
    assert "linear.weight" in report.dropped
    wanted, found = merged_by_peft(make_zoo(), pair.adapter), merged_by_peft(make_zoo(), tmp_path / "out")
    for name in ("linear.bias", "c_attn.bias"):
        assert torch.equal(found[name], wanted[name]), name


def test_a_trained_bias_inside_an_attention_is_found_again_by_peft(tmp_path: Path) -> None:
    pair = adapted(tmp_path, target_modules=["attention"], bias="lora_only")
    loratool.resize(pair.adapter, tmp_path / "out", rank=3)
    assert {n for n in load_file(tmp_path / "out" / "adapter_model.safetensors") if "bias" in n} == {
        n for n in load_file(pair.adapter / "adapter_model.safetensors") if "bias" in n
    }
    with torch.inference_mode():
        torch.testing.assert_close(loaded(make_zoo(), tmp_path / "out")(TOKENS), pair.output, rtol=1e-4, atol=1e-5)


def test_layers_with_a_bias_of_their_own_can_be_left_out(tmp_path: Path) -> None:
    """Whatever becomes of what lora_B's bias adds: it is said or refused, and no KeyError."""
    pair = adapted(tmp_path, **KINDS["lora_bias"])
    try:
        report = loratool.resize(pair.adapter, tmp_path / "out", budget=60)
    except UsageError as refusal:
        assert "bias" in str(refusal)  # noqa: PT017
        return
    assert set(exact_deltas(make_zoo(), tmp_path / "out")) == set(report.modules)
    assert not report.dropped or any("bias" in note for note in map(str, report.notes))


def test_a_dora_layer_that_is_left_out_takes_its_magnitude_along(tmp_path: Path) -> None:
    pair = adapted(tmp_path, use_dora=True)
    report = loratool.resize(pair.adapter, tmp_path / "out", budget=60)
    assert report.dropped
    assert set(exact_deltas(make_zoo(), tmp_path / "out")) == set(report.modules)
    for target in report.dropped:
        assert not any(target.split(".")[0] in n for n in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    loratool.merge(pair.base, [tmp_path / "out"], tmp_path / "merged")


class Nested(nn.Module):
    """Two layers of one name, one of them deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.block = nn.ModuleDict({"linear": nn.Linear(6, 40)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block["linear"](self.linear(x))
        return result


def test_a_layer_that_is_left_out_is_not_adapted_again_by_the_name_of_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    pair = train(tmp_path, model, LoraConfig(r=2, lora_alpha=4, target_modules=["linear"]), torch.randn(2, 4))
    report = loratool.resize(pair.adapter, tmp_path / "out", budget=12)
    assert report.dropped == ("block.linear.weight",)
    assert set(exact_deltas(model, tmp_path / "out")) == {"linear.weight"}


@pytest.mark.parametrize("kind", ["modules_to_save", "trained tokens", "DoRA", "trained biases", "lora_bias"])
@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_what_is_no_factor_has_the_same_name_and_the_same_bits(kind: str, dtype: str, tmp_path: Path) -> None:
    pair = of_kind(tmp_path, kind)
    loratool.resize(pair.adapter, tmp_path / "out", rank=1, dtype=dtype)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (pair.adapter, tmp_path / "out"))
    factors = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    kept = {n for n in before if not n.endswith(factors)}
    assert kept
    assert kept == {n for n in after if not n.endswith(factors)}
    for name in kept:
        if name.endswith("lora_B.bias"):  # its scale is 1 now
            torch.testing.assert_close(after[name], before[name] * (5 / 3), rtol=1e-6, atol=0)
        else:
            assert same_bits(after[name], before[name]), name


def test_a_single_file_has_no_files_beside_it(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "adapter_model.safetensors").rename(adapter / "mine.safetensors")
    loratool.resize(adapter / "mine.safetensors", tmp_path / "out", rank=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "loratool.json")
    ]


# ---- writing ----


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["plain", "modules_to_save", "nn.MultiheadAttention"])
def test_every_file_is_the_same_at_every_run_and_a_dry_run_tells_all_of_its_numbers(kind: str, tmp_path: Path) -> None:
    pair = of_kind(tmp_path, kind)
    there = sorted(p.name for p in tmp_path.iterdir())
    dry = loratool.resize(pair.adapter, tmp_path / "one", error=0.3, dtype="bfloat16", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == there
    wet = loratool.resize(pair.adapter, tmp_path / "one", error=0.3, dtype="bfloat16")
    loratool.resize(pair.adapter, tmp_path / "two", error=0.3, dtype="bfloat16")
    for field in ("rule", "totals", "modules", "dropped", "dtype", "notes"):
        assert getattr(dry, field) == getattr(wet, field), field
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    made = json.loads((tmp_path / "one" / "loratool.json").read_text())
    assert made["rule"] == "error 0.3"
    assert set(made["adapter"]["sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_dry_run_does_not_touch_what_is_there(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    loratool.resize(adapter, tmp_path / "out", rank=4)
    before = picture(tmp_path)
    for overwrite in (False, True):
        loratool.resize(adapter, tmp_path / "out", rank=2, dry_run=True, overwrite=overwrite)
        assert picture(tmp_path) == before


def test_what_fails_or_is_interrupted_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    loratool.resize(adapter, tmp_path / "out", rank=4)
    before = picture(tmp_path)

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.resize(adapter, tmp_path / "out", rank=2, overwrite=True, progress=interrupt)
    assert picture(tmp_path) == before
    with pytest.raises(UsageError):
        loratool.resize(adapter, tmp_path / "out", budget=9, overwrite=True)
    assert picture(tmp_path) == before


def test_a_folder_that_is_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = picture(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            loratool.resize(adapter, tmp_path / "out", rank=2, overwrite=overwrite)
        assert picture(tmp_path) == before


@pytest.mark.parametrize(
    "words", [["resize", "--rank", "2"], ["rescale", "--scale", "2"], ["combine"]], ids=lambda w: w[0]
)
def test_a_model_is_never_replaced_by_an_adapter(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write(tmp_path / "adapter")
    model = tmp_path / "model"
    save_model(model, {"w": torch.ones(2, 2)}, {})
    before = picture(tmp_path)
    assert run([*words, str(adapter), "-o", str(model), "--overwrite"]) == 2
    assert "is not an adapter" in capsys.readouterr().err
    assert picture(tmp_path) == before


def test_progress_counts_every_layer_once(tmp_path: Path) -> None:
    pair = of_kind(tmp_path, "plain")
    seen: list[tuple[int, int]] = []
    loratool.resize(pair.adapter, tmp_path / "out", rank=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    assert seen == sorted(set(seen))


# ---- what is refused, on the command line ----


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    bench = Workbench(tmp_path, capsys)
    shutil.rmtree(bench.adapter)
    write(bench.adapter)
    return bench


def as_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["base_model.model.model.q.lora_A.weight"][0, 0] = float("nan")
    tensors["base_model.model.model.v.lora_B.weight"][3, 1] = float("inf")
    return tensors


def as_zero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t * ("lora_A" in n) for n, t in tensors.items()}


def as_huge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t * 1e6 for n, t in tensors.items()}


def with_a_stray(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.q.lora_X.weight": torch.ones(2)}


RANK = ["--rank", "2"]


@pytest.mark.parametrize(
    ("spoil", "options", "told", "code"),
    [
        (as_nan, RANK, ["q.lora_A.weight", "v.lora_B.weight"], 3),
        (as_nan, ["--energy", "0.9"], ["q.lora_A.weight", "v.lora_B.weight"], 3),
        (as_nan, ["--budget", "1k", "--dry-run"], ["q.lora_A.weight", "v.lora_B.weight"], 3),
        (as_zero, RANK, ["every update is zero"], 4),
        (as_zero, ["--energy", "0.9"], ["every update is zero"], 4),
        (as_zero, ["--budget", "1k"], ["every update is zero"], 4),
        (as_zero, ["--error", "0.1", "--dry-run"], ["every update is zero"], 4),
        (as_huge, [*RANK, "--dtype", "float16"], ["overflow float16", "--dtype"], 4),
        (as_huge, [*RANK, "--dtype", "float16", "--dry-run"], ["overflow float16"], 4),
        (with_a_stray, RANK, ["lora_X"], 4),
    ],
)
def test_tensors_that_cannot_be_resized_are_refused(
    bench: Workbench,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    options: list[str],
    told: list[str],
    code: int,
) -> None:
    spoiled(bench.adapter, spoil)
    bench.refuses("resize", bench.adapter, "-o", bench.out, *options, told=told, code=code)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rank", "0"], ["a whole number of at least 1"]),
        (["--rank", "-2"], ["a whole number of at least 1"]),
        ([], ["one of --rank, --energy, --error, --ratio, --cumulative, --budget", "(got none)"]),
        (["--rank", "2", "--budget", "9", "--ratio", "3"], ["--rank and --ratio and --budget"]),
        (["--energy", "nan"], ["--energy must be above 0 and at most 1 (got nan)"]),
        (["--error", "1"], ["[0, 1)"]),
        (["--ratio", "1"], ["above 1"]),
        (["--cumulative", "0"], ["--cumulative must be above 0"]),
        (["--budget", "many"], ["--budget many", "4M"]),
        (["--budget", "109"], ["--budget 109 parameters", "takes 110 parameters"]),
    ],
)
def test_words_that_cannot_be_meant_are_refused(bench: Workbench, options: list[str], told: list[str]) -> None:
    bench.refuses("resize", bench.adapter, "-o", bench.out, *options, told=told, code=2)


def test_kinds_that_are_not_low_rank_are_refused_on_the_command_line(bench: Workbench) -> None:
    set_config(bench.adapter, init_lora_weights="pissa")
    bench.refuses("resize", bench.adapter, "-o", bench.out, *RANK, told=["loratool extract BASE MERGED"])
    train(bench.inputs / "loha", make_zoo(), HRAConfig(r=2, target_modules=["linear"]))
    bench.refuses(
        "resize", bench.inputs / "loha" / "adapter", "-o", bench.out, *RANK, told=["loratool extract BASE MERGED"]
    )


def test_an_output_inside_an_input_is_refused(bench: Workbench) -> None:
    for out in (bench.adapter, bench.adapter / "out", bench.inputs):
        for more in ([], ["--overwrite"], ["--dry-run"]):
            bench.refuses("resize", bench.adapter, "-o", out, *RANK, *more, told=[], code=2)


def test_a_calibration_that_is_not_of_the_adapter_is_refused_with_all_that_is_wrong(bench: Workbench) -> None:
    path = bench.inputs / "c.safetensors"
    words: list[str | Path] = ["resize", bench.adapter, "-o", bench.out, *RANK, "--calibration", path]
    eye = torch.eye(12)
    for tensors, told in (
        (
            {"model.q": torch.eye(11), "model.x": eye},
            ["model.q", "12 × 12", "model.v: missing", "model.x: the adapter has no such module"],
        ),
        ({"model.q": eye.int(), "model.v": torch.ones(12, 12).triu()}, ["expected floats", "model.v: is not symm"]),
        (
            {"model.q": eye * float("inf"), "model.v": eye * float("nan")},
            ["model.q: contains NaN", "model.v: contains NaN"],
        ),
    ):
        save_file(tensors, path)
        bench.refuses(*words, told=told)
    path.write_bytes(b"no tensors at all")
    bench.refuses(*words, told=["c.safetensors"])
    path.unlink()
    bench.refuses(*words, told=["no such file"])


def test_the_command_writes_what_the_function_does_and_tells_it_as_json(bench: Workbench) -> None:
    options = ["--error", "0.3", "--uniform", "--dtype", "bfloat16"]
    dry = bench.run("resize", bench.adapter, "-o", bench.out, *options, "--json", "--dry-run")
    assert (dry.code, dry.err, bench.out.exists()) == (0, "", False)
    wet = bench.run("resize", bench.adapter, "-o", bench.out, *options, "--json")
    one, other = json.loads(dry.out), json.loads(wet.out)
    assert one["modules"] == other["modules"]
    assert one["totals"] == other["totals"]
    loratool.resize(bench.adapter, bench.outputs / "two", error=0.3, uniform=True, dtype="bfloat16")
    assert bytes_of(bench.out) == bytes_of(bench.outputs / "two")


# ---- what people published ----

LORA_TYPES = ("LORA", "ADALORA")
REFUSED = ("ih-bloomz560m-zeroB", "neg-lfs-pointer-gliner", "seqcls-lora-on-saved-head")  # all zero; no tensors; copies


def is_lora(folder: Path) -> bool:
    path = folder / "adapter_config.json"
    return path.is_file() and json.loads(path.read_text()).get("peft_type") in LORA_TYPES


PUBLISHED = sorted(f.name for f in REAL.iterdir() if is_lora(f) and f.name not in REFUSED) if REAL.is_dir() else []


def stored_factors(folder: Path, most: int) -> dict[str, tuple[Tensor, Tensor]]:
    """s·B and A of some linear layers, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    adaptive = config["peft_type"] == "ADALORA"
    scale = float(config["lora_alpha"]) / (config["init_r"] + 1e-5 if adaptive else config["r"])
    end = "" if adaptive else ".weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [n for n in tensors if n.endswith(f"lora_A{end}") and tensors[n].dim() == 2]
    found = {}
    for name in names[:: max(1, len(names) // most)][:most]:
        down, up = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        if adaptive:
            down = down * tensors[name.replace("lora_A", "lora_E")].double()
        found[name.removeprefix("base_model.model.").removesuffix(f".lora_A{end}")] = (scale * up, down)
    return found


@pytest.mark.skipif(not REAL.is_dir(), reason="the published adapters are not here")
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_adapter_is_cut_to_rank_2_as_its_dense_updates_are(name: str, tmp_path: Path) -> None:
    report = loratool.resize(REAL / name, tmp_path / "out", rank=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before = stored_factors(REAL / name, 2)
    assert before
    for module, (up, down) in before.items():
        dense = up @ down
        start = f"base_model.model.{module}.lora_"
        found = tensors[f"{start}B.weight"].double() @ tensors[f"{start}A.weight"].double()
        layer = report.modules[f"{module}.weight"]
        # (BA)(BA)ᵀ has the eigenvalues of BᵀB AAᵀ besides zeros: those of the large matrix take seconds
        squares = torch.linalg.eigvals((up.T @ up) @ (down @ down.T)).real.sort(descending=True).values.clamp_min(0)
        size = float(dense.norm())
        best = float(squares[2:].sum().sqrt()) / size
        left = float((dense - found).norm()) / size
        assert layer.norm == pytest.approx(size, rel=1e-6)
        assert layer.predicted == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert layer.achieved == pytest.approx(left, rel=1e-5, abs=1e-9)
        assert left <= best + 5e-4  # of which half a precision takes its part


@pytest.mark.skipif(not REAL.is_dir(), reason="the published adapters are not here")
def test_published_adapters_without_an_update_are_refused(tmp_path: Path) -> None:
    assert "every update is zero" in refused(REAL / "ih-bloomz560m-zeroB", tmp_path / "out", FitError)
    assert "Git LFS" in refused(REAL / "neg-lfs-pointer-gliner", tmp_path / "out", InputError)
