"""An adapter at another strength is what PEFT makes of the file that is written, times the factor."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from oracle import read_tensors
from peft import LoraConfig, PeftModel
from peft_files import edit_config, save_peft
from peft_zoo import Pair, make_zoo, output_of, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats.peft.spelling import Names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench import Workbench

    from loratool.adapters.formats.format import Format
    from loratool.adapters.layers import Kind

LAYERS = ["embed", "linear", "c_attn", "square", "conv1", "conv2"]
PLAIN: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": LAYERS}


def made(folder: Path, **settings: Any) -> Pair:
    return train(folder, make_zoo(), LoraConfig(**{**PLAIN, **settings}))


def delta_by_peft(pair: Pair, adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight when it merges the adapter at a path."""
    model = copy.deepcopy(make_zoo())
    wrapped = PeftModel.from_pretrained(model, adapter)
    merged = wrapped.merge_and_unload().state_dict()
    return {name: merged[name].double() - before.double() for name, before in pair.before.items()}


def assert_scaled(found: dict[str, Tensor], before: dict[str, Tensor], factor: float, only: str = "") -> None:
    assert set(found) == set(before)
    for name, delta in before.items():
        wanted = delta * factor if only in name else delta
        assert float((found[name] - wanted).abs().max()) <= 2e-6 * max(1.0, abs(factor)), name


@pytest.mark.parametrize("factor", [0.5, 3, -1.25])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"conv.": 2, "^square": 5}, "alpha_pattern": {"c_attn": 1, "(linear|conv2)": 11}},
        {"target_modules": ["attention"]},
        {"target_modules": ["linear", "c_attn"], "lora_bias": True},
    ],
    ids=["plain", "rsLoRA", "patterns", "nn.MultiheadAttention", "lora_bias"],
)
@pytest.mark.parametrize("bake", [False, True], ids=["by alpha", "baked"])
def test_peft_adds_the_factor_times_what_it_added_before(
    settings: dict[str, Any], factor: float, bake: bool, tmp_path: Path
) -> None:
    pair = made(tmp_path, **settings)
    report = loratool.rescale(pair.adapter, tmp_path / "out", scale=factor, bake=bake)
    assert_scaled(delta_by_peft(pair, tmp_path / "out"), delta_by_peft(pair, pair.adapter), factor)
    assert {round(layer.factor or 0, 9) for layer in report.modules.values()} == {factor}


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)], ids=str)
def test_baked_and_converted_factors_are_rounded_once(dtype: torch.dtype, step: float, tmp_path: Path) -> None:
    """A number that float32 takes for the one half-way between two."""
    factors = {f"{side}": torch.ones(4, 4, dtype=dtype) for side in "AB"}
    tensors = {
        f"base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{s}.weight": t
        for s, t in factors.items()
    }
    save_peft(tmp_path / "adapter", tensors, r=4, lora_alpha=4, target_modules=["to_q"])
    factor = 1 + step / 2 + 2.0**-40
    loratool.rescale(tmp_path / "adapter", tmp_path / "baked", scale=factor, bake=True)
    edit_config(tmp_path / "adapter", lora_alpha=4 * factor)
    loratool.convert(tmp_path / "adapter", tmp_path / "converted", to="diffusers", architecture="sd15")
    for folder in ("baked", "converted"):
        (file,) = (tmp_path / folder).glob("*.safetensors")
        (up,) = (tensor for name, tensor in load_file(file).items() if "lora_B" in name)
        assert torch.equal(up, torch.full((4, 4), 1 + step, dtype=dtype)), folder


def test_without_baking_no_byte_of_a_tensor_changes(tmp_path: Path) -> None:
    pair = made(tmp_path, alpha_pattern={"linear": 7})
    loratool.rescale(pair.adapter, tmp_path / "out", scale=0.3)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (pair.adapter / name).read_bytes()
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (pair.adapter, tmp_path / "out"))
    assert after["lora_alpha"] == pytest.approx(1.5)
    assert after["alpha_pattern"] == {"linear": pytest.approx(2.1)}
    assert {k: v for k, v in after.items() if "alpha" not in k} == {k: v for k, v in before.items() if "alpha" not in k}


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"alpha_pattern": {"linear": 7}, "rank_pattern": {"c_attn": 2}}]
)
def test_who_reads_alpha_and_r_only_gets_a_baked_adapter_right(settings: dict[str, Any], tmp_path: Path) -> None:
    pair = made(tmp_path, target_modules=["linear", "square", "c_attn"], **settings)
    loratool.rescale(pair.adapter, tmp_path / "out", bake=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is False
    assert config["alpha_pattern"] == config["rank_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = delta_by_peft(pair, pair.adapter)
    for module in ("linear", "square", "c_attn"):
        start = f"base_model.model.{module}.lora_"
        product = tensors[f"{start}B.weight"].double() @ tensors[f"{start}A.weight"].double()  # at α/r = 1
        delta = wanted[f"{module}.weight"]
        torch.testing.assert_close(product, delta.T if module == "c_attn" else delta, rtol=0, atol=2e-6)


def test_a_baked_adapter_keeps_its_a_bit_for_bit(tmp_path: Path) -> None:
    pair = made(tmp_path)
    loratool.rescale(pair.adapter, tmp_path / "out", bake=True, scale=0.7)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (pair.adapter, tmp_path / "out"))
    for name in (n for n in before if "lora_A" in n):
        assert torch.equal(before[name], after[name])


def test_alpha_is_that_of_every_module_and_patterns_are_given_up(tmp_path: Path) -> None:
    pair = made(tmp_path, alpha_pattern={"linear": 7, "conv1": 2})
    loratool.rescale(pair.adapter, tmp_path / "out", alpha=6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6, {})
    found, before = delta_by_peft(pair, tmp_path / "out"), delta_by_peft(pair, pair.adapter)
    for name, alpha in (("linear.weight", 7), ("conv1.weight", 2), ("square.weight", 5)):
        torch.testing.assert_close(found[name], before[name] * 6 / alpha, rtol=0, atol=2e-6)


def test_an_alpha_takes_no_look_at_all_layers_for_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of an adapter's layers are worked out as often for five layers as for one: thousands took minutes."""
    asked: list[int] = []
    original = Names.__init__

    def counting(names: Names, form: Format, kinds: Mapping[str, Kind], release: str = "") -> None:
        asked.append(len(kinds))
        original(names, form, kinds, release)

    monkeypatch.setattr(Names, "__init__", counting)
    counts = set()
    for at, layers in enumerate((["linear"], ["linear", "c_attn", "square", "conv1", "conv2"])):
        (tmp_path / str(at)).mkdir()
        pair = made(tmp_path / str(at), target_modules=layers)
        asked.clear()
        loratool.rescale(pair.adapter, tmp_path / f"out{at}", alpha=6)
        assert asked[-1] >= len(layers)
        counts.add(len(asked))
    assert len(counts) == 1


def test_the_first_pattern_that_is_found_multiplies_a_module(tmp_path: Path) -> None:
    pair = made(tmp_path)
    loratool.rescale(pair.adapter, tmp_path / "out", scale=2, match=["conv1=10", "conv=0.5", "^sq=-1"])
    found, before = delta_by_peft(pair, tmp_path / "out"), delta_by_peft(pair, pair.adapter)
    for name, factor in (("conv1", 20), ("conv2", 1), ("square", -2), ("linear", 2), ("embed", 2)):
        torch.testing.assert_close(found[f"{name}.weight"], before[f"{name}.weight"] * factor, rtol=0, atol=2e-5)


def test_norms_come_out_as_asked(tmp_path: Path) -> None:
    pair = made(tmp_path, target_modules=["linear", "square", "c_attn"])
    for at, (asked, each) in enumerate(
        [("frobenius", False), ("frobenius", True), ("spectral", False), ("spectral", True)]
    ):
        out = tmp_path / str(at)
        loratool.rescale(pair.adapter, out, **{asked: 0.75}, each=each)  # type: ignore[arg-type]
        deltas = [d for name, d in delta_by_peft(pair, out).items() if bool(d.abs().max() > 1e-9)]
        if asked == "frobenius":
            sizes = torch.stack([d.norm() for d in deltas])
            reached = sizes if each else sizes.norm()[None]
        else:
            sizes = torch.stack([torch.linalg.matrix_norm(d, 2) for d in deltas])
            reached = sizes if each else sizes.max()[None]
        torch.testing.assert_close(reached, torch.full_like(reached, 0.75), rtol=1e-5, atol=0)


def test_a_baked_adalora_is_plain_lora(tmp_path: Path) -> None:
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=4, r=4, target_r=2, lora_alpha=6, target_modules=["linear", "square"], total_step=9)
    pair = train(tmp_path, make_zoo(), config)
    loratool.rescale(pair.adapter, tmp_path / "out", bake=True, scale=2)
    assert_scaled(delta_by_peft(pair, tmp_path / "out"), delta_by_peft(pair, pair.adapter), 2)


def test_of_dora_it_is_said_that_only_the_direction_changes(tmp_path: Path) -> None:
    pair = made(tmp_path, target_modules=["linear", "square"], use_dora=True)
    report = loratool.rescale(pair.adapter, tmp_path / "out", scale=0.5)
    assert any("DoRA" in note and "length m" in note for note in map(str, report.notes))
    norms = {name: tensor.norm(dim=1) for name, tensor in read_merged(pair, tmp_path).items()}
    magnitudes = load_file(pair.adapter / "adapter_model.safetensors")
    for name in ("linear", "square"):
        wanted = magnitudes[f"base_model.model.{name}.lora_magnitude_vector"].abs()
        torch.testing.assert_close(norms[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6)


def read_merged(pair: Pair, folder: Path) -> dict[str, Tensor]:
    merged = folder / "merged"
    loratool.merge(pair.base, [folder / "out"], merged)
    return {n: t for n, t in read_tensors(merged).items() if n in ("linear.weight", "square.weight")}


def test_a_baked_dora_is_the_same_model(tmp_path: Path) -> None:
    pair = made(tmp_path, target_modules=["linear", "square"], use_dora=True, use_rslora=True)
    loratool.rescale(pair.adapter, tmp_path / "out", bake=True)
    wrapped = PeftModel.from_pretrained(make_zoo(), tmp_path / "out").eval()
    from peft_zoo import TOKENS

    with torch.inference_mode():
        torch.testing.assert_close(wrapped(TOKENS), pair.output, rtol=1e-5, atol=1e-5)


def test_what_is_saved_whole_has_no_strength_and_it_is_said(tmp_path: Path) -> None:
    pair = made(tmp_path, target_modules=["linear"], modules_to_save=["head"])
    for bake in (False, True):
        report = loratool.rescale(pair.adapter, tmp_path / str(bake), scale=0.5, bake=bake)
        assert any("saved whole" in note for note in map(str, report.notes))
        found = load_file(tmp_path / str(bake) / "adapter_model.safetensors")
        before = load_file(pair.adapter / "adapter_model.safetensors")
        for name in ("base_model.model.head.weight", "base_model.model.head.bias"):
            assert torch.equal(found[name], before[name])


def test_a_merge_of_the_rescaled_adapter_is_a_merge_with_that_weight(tmp_path: Path) -> None:
    pair = made(tmp_path)
    loratool.rescale(pair.adapter, tmp_path / "out", scale=0.4)
    loratool.merge(pair.base, [tmp_path / "out"], tmp_path / "one")
    loratool.merge(pair.base, [pair.adapter], tmp_path / "other", weights=[0.4])
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "other")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    assert float((output_of(one, make_zoo()) - pair.output).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        ([], "nothing to do", 2),
        (["--scale", "2", "--alpha", "3"], "--scale and --alpha are mutually exclusive", 2),
        (["--scale", "0"], "--scale must be", 2),
        (["--scale", "nan"], "finite", 2),
        (["--frobenius", "-1"], "above 0", 2),
        (["--scale", "2", "--each"], "--each needs", 2),
        (["--match", "nonsense"], "REGEX=FACTOR", 2),
        (["--match", "(=2"], "not a valid regular expression", 2),
        (["--match", "nowhere=2"], "no adapted module matches", 2),
        (["--match", "a=0"], "other than 0", 2),
        (["--scale", "1e30", "--bake", "--dtype", "float16"], "overflow", 4),
    ],
)
def test_what_cannot_be_meant_is_refused(bench: Workbench, options: list[str], told: str, code: int) -> None:
    bench.refuses("rescale", bench.adapter, "-o", bench.out, *options, told=[told], code=code)


def test_a_norm_of_nothing_is_refused(bench: Workbench) -> None:
    path = bench.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, path)
    bench.refuses("rescale", bench.adapter, "-o", bench.out, "--spectral", "1", told=["every update is zero"], code=4)
    bench.refuses("rescale", bench.adapter, "-o", bench.out, "--spectral", "1", "--each", told=["is zero"], code=4)


def test_layers_that_were_never_trained_stay_zero_when_each_gets_a_norm(tmp_path: Path) -> None:
    """Real adapters have some; the others get their norm, and a note names the first that does not."""
    adapter, out = made(tmp_path, target_modules=["linear", "square"]).adapter, tmp_path / "out"
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeros = "base_model.model.square.lora_B.weight"
    save_file({**tensors, zeros: tensors[zeros] * 0}, adapter / "adapter_model.safetensors")
    report = loratool.rescale(adapter, out, spectral=1.0, each=True)
    assert "such as square.weight: each is zero" in next(n.text for n in report.notes if n.code == "update-is-rounding")
    after = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    for module, wanted in (("linear", 1.0), ("square", 0.0)):
        up, down = (after[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
        scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / config["r"]
        assert float(torch.linalg.matrix_norm(scale * up @ down, 2)) == pytest.approx(wanted)


def test_nan_is_refused_and_nothing_written(bench: Workbench) -> None:
    path = bench.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if "lora_A" in n)[0, 0] = float("nan")
    save_file(tensors, path)
    bench.refuses("rescale", bench.adapter, "-o", bench.out, "--bake", told=["contains NaN"], code=3)
    bench.refuses("rescale", bench.adapter, "-o", bench.out, "--frobenius", "1", told=["contains NaN"], code=3)


@pytest.mark.parametrize("command", ["rescale --scale 2", "rescale --scale 2 --bake", "resize --rank 2"])
@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("linear.lora_A.weight", {}),
        ("head.weight", {"modules_to_save": ["head"]}),
        ("linear.lora_B.bias", {"lora_bias": True}),
        ("linear.lora_magnitude_vector", {"use_dora": True}),
    ],
)
def test_nan_anywhere_in_an_adapter_is_refused(
    part: str, settings: dict[str, Any], command: str, bench: Workbench, tmp_path: Path
) -> None:
    pair = train(tmp_path / "made", make_zoo(), LoraConfig(r=3, lora_alpha=5, target_modules=["linear"], **settings))
    weights = pair.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    broken = next(name for name in tensors if name.endswith(part))
    tensors[broken].view(-1)[-1] = float("nan")
    save_file(tensors, weights)
    name, *options = command.split()
    bench.refuses(name, pair.adapter, "-o", bench.out, *options, told=[broken, "contains NaN"], code=3)


def test_a_dry_run_tells_the_same_and_writes_nothing(bench: Workbench) -> None:
    dry = json.loads(
        bench.run("rescale", bench.adapter, "-o", bench.out, "--scale", "2", "--bake", "--dry-run", "--json").out
    )
    assert not bench.out.exists()
    wet = json.loads(bench.run("rescale", bench.adapter, "-o", bench.out, "--scale", "2", "--bake", "--json").out)
    assert dry["modules"] == wet["modules"]
    assert (dry["written"], wet["written"]) == (False, True)
    assert sorted(p.name for p in bench.out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loratool.json",
    ]


@pytest.mark.parametrize("factor", [1e-11, 1e-30])
def test_however_weak_an_adapter_gets_its_alpha_is_not_rounded_away(factor: float, tmp_path: Path) -> None:
    pair = made(tmp_path, alpha_pattern={"linear": 7})
    loratool.rescale(pair.adapter, tmp_path / "out", scale=factor)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(5 * factor, rel=1e-9)
    assert config["alpha_pattern"] == {"linear": pytest.approx(7 * factor, rel=1e-9)}


@pytest.mark.parametrize("factor", ["1e300", "1e308"])
def test_a_scale_that_no_float32_holds_is_refused(factor: str, bench: Workbench) -> None:
    told = ["alpha would overflow float32", "q_proj"]
    bench.refuses("rescale", bench.adapter, "-o", bench.out, "--scale", factor, told=told, code=2)
    bench.refuses(
        "rescale", bench.adapter, "-o", bench.out, "--scale", factor, "--bake", told=["overflow float32"], code=4
    )


def test_factors_that_would_all_be_zero_are_not_written(bench: Workbench) -> None:
    """2e-8 is the smallest that float16 has."""
    words: list[str | Path] = ["rescale", bench.adapter, "-o", bench.out, "--scale", "1e-12", "--bake"]
    bench.refuses(*words, "--dtype", "float16", told=["all of B would be zero in float16"], code=4)
    bench.run(*words, "--dtype", "float32")
    assert all(tensor.any() for tensor in load_file(bench.out / "adapter_model.safetensors").values())


@pytest.mark.parametrize("options", [[], ["--bake"]])
def test_a_dry_run_refuses_what_the_run_does(options: list[str], bench: Workbench) -> None:
    weights = bench.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, weights)
    words: list[str | Path] = ["rescale", bench.adapter, "-o", bench.out, "--scale", "2", "--dry-run", *options]
    bench.refuses(*words, told=[name, "contains NaN"], code=3)


@pytest.mark.parametrize("pattern", ["[", "(q_proj", "*"])
def test_a_pattern_that_is_none_is_told_as_it_was_given(pattern: str, bench: Workbench) -> None:
    words: list[str | Path] = ["rescale", bench.adapter, "-o", bench.out, "--match", f"{pattern}=2"]
    bench.refuses(*words, told=[f"'{pattern}'"], code=2)


@pytest.mark.parametrize(
    "options", [{"frobenius": 1.5, "each": True}, {"match": ["out_proj=3"]}], ids=["norm", "match"]
)
def test_weights_that_share_an_alpha_get_factors_of_their_own_by_baking_only(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT has one α for in_proj and out_proj of an attention."""
    pair = made(tmp_path, target_modules=["attention", "linear"])
    with pytest.raises(loratool.InputError, match="--bake") as caught:
        loratool.rescale(pair.adapter, tmp_path / "out", **options)
    assert "attention." in str(caught.value)
    assert not (tmp_path / "out").exists()
    loratool.rescale(pair.adapter, tmp_path / "out", bake=True, **options)
    before, after = (delta_by_peft(pair, path) for path in (pair.adapter, tmp_path / "out"))
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"):
        kept = 3.0 if "out_proj" in name else 1.0
        wanted = 1.5 if "each" in options else kept * float(before[name].norm())
        assert float(after[name].norm()) == pytest.approx(wanted, rel=1e-5)
