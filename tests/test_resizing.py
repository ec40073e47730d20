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
from oracle import picture, read_tensors
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel
from peft_zoo import TOKENS, Pair, make_zoo, train
from safetensors.torch import load_file, save_file
from test_peft_parameters import BOTH, FUSED, INPUTS, Layers
from torch import Tensor, nn
from workbench import Workbench

import loratool
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
    folder.mkdir(parents=True)
    tensors = {}
    for module, rows, columns in (("model.q", 60, 50), ("model.v", 40, 70)):
        spread = 0.7 ** torch.arange(rank).float()[:, None]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * spread
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


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
    assert any("DoRA" in note for note in report.notes)


def spoiled(adapter: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    path = adapter / "adapter_model.safetensors"
    save_file(dict(change(load_file(path))), path)
    return adapter


def set_config(adapter: Path, **fields: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return adapter


def refused(adapter: Path, out: Path, kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        loratool.resize(adapter, out, **{"rank": 2, **options})
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return str(caught.value)


def test_adapters_that_are_not_low_rank_are_refused_with_a_way_out(tmp_path: Path) -> None:
    pissa = set_config(write(tmp_path / "pissa"), init_lora_weights="pissa")
    assert "path_initial_model_for_weight_conversion" in refused(pissa, tmp_path / "out", InputError)
    pair = train(tmp_path / "loha", make_zoo(), LoHaConfig(r=2, target_modules=["linear"]))
    assert "convert_to_lora" in refused(pair.adapter, tmp_path / "out", InputError)


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
    assert any("model.v.weight: the update is zero" in note for note in report.notes)
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
        ({"model.q": torch.eye(12), "model.v": torch.eye(11)}, "12 × 12 floats are wanted"),
        ({"model.q": torch.eye(12), "model.v": torch.eye(12), "model.x": torch.eye(2)}, "model.x: no module"),
        ({"model.q": torch.eye(12), "model.v": torch.ones(12, 12).triu()}, "model.v: is not symmetric"),
        ({"model.q": torch.eye(12), "model.v": torch.eye(12) * float("nan")}, "model.v: holds NaN"),
    ],
)
def test_a_calibration_of_something_else_is_refused(grams: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    save_file(grams, tmp_path / "c.safetensors")
    message = refused(write(tmp_path / "adapter"), tmp_path / "out", InputError, calibration=tmp_path / "c.safetensors")
    assert told in message


def test_the_command_s_refusals_have_the_contract_s_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Workbench(tmp_path / "bench", capsys)
    adapter = write(bench.inputs / "other")
    for options, told, code in (
        ([], "one of --rank", 2),
        (["--rank", "2", "--energy", "0.9"], "--rank and --energy", 2),
        (["--rank", "0"], "a whole number from 1 on", 2),
        (["--rank", "41"], "40 is the most", 2),
        (["--energy", "2"], "(0, 1]", 2),
        (["--budget", "9"], "too little for rank 1", 2),
        (["--rank", "2", "--calibration", str(tmp_path / "nowhere")], "no such file", 3),
        (["--budget", "99999", "--layer-weights", str(adapter / "adapter_model.safetensors")], "no JSON", 3),
    ):
        bench.refuses("resize", adapter, "-o", bench.out, *options, told=[told], code=code)
    bench.refuses("resize", adapter, "-o", adapter / "inside", "--rank", "2", told=["never written to"], code=2)
    bench.refuses("resize", bench.inputs / "nowhere", "-o", bench.out, "--rank", "2", told=["no such file"], code=3)
    assert bench.run("resize", adapter, "-o", bench.out, "--rank", "2", "-q").out == ""


REAL = Path(__file__).resolve().parents[2] / "shared" / "real-adapters"


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
