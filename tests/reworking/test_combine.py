"""`combine` on adapters that are written by hand: sums, reports, weights, what stands beside, and what is refused.

The oracle reads files with the safetensors package and computes s·BA in float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle import off
from peft_files import config_of, save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from workbench import Outcome, check_refusal, snapshot

import loratool
from loratool.cli import run

Array = NDArray[np.float64]
START = "base_model.model."
QUERY, VALUE, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.0.mlp.down_proj",
)
SIZES = {QUERY: (20, 20), VALUE: (12, 20), DOWN: (20, 30)}  # (out, in)


def draw(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def adapter(
    folder: Path,
    seed: int = 0,
    ranks: Mapping[str, int] | int = 4,
    extra: Mapping[str, Tensor] | None = None,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """An adapter of these modules and ranks, as PEFT saves it."""
    ranks = dict.fromkeys(SIZES, ranks) if isinstance(ranks, int) else ranks
    tensors: dict[str, Tensor] = {}
    for at, (module, rank) in enumerate(ranks.items()):
        rows, columns = SIZES[module]
        tensors[f"{START}{module}.lora_A.weight"] = (draw(100 * seed + 2 * at, rank, columns) / 5).to(dtype)
        tensors[f"{START}{module}.lora_B.weight"] = (draw(100 * seed + 2 * at + 1, rows, rank) * size / 3).to(dtype)
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    patterns = {module: rank for module, rank in ranks.items() if rank != usual}
    return write(
        folder,
        {**tensors, **(extra or {})},
        **{
            "r": usual,
            "lora_alpha": 2 * usual,
            "rank_pattern": patterns,
            "target_modules": [module.rpartition(".")[2] for module in ranks],
            **config,
        },
    )


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    return save_peft(
        folder,
        {name: t.contiguous().clone() for name, t in tensors.items()},
        **{"base_model_name_or_path": "some/base", **config},
    )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def deltas(folder: Path) -> dict[str, Array]:
    """s·BA of every module; patterns are whole names here."""
    config, tensors = config_of(folder), tensors_of(folder)
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(START).removesuffix(".lora_A.weight")
            up = tensors[f"{START}{module}.lora_B.weight"]
            rank = down.shape[0]
            alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            found[module] = scale * np.asarray(up.double() @ down.double())
    return found


def summed(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Array]:
    total: dict[str, Array] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, np.zeros_like(delta)) + weight * delta
    return total


def assert_alike(found: Mapping[str, Array], wanted: Mapping[str, Array], limit: float = 3e-7) -> None:
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        assert off(found[module], delta) < limit, module


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Adapters of other ranks, modules and scalings."""
    return [
        adapter(tmp_path / "in" / "one", 1, {QUERY: 4, DOWN: 2}, alpha_pattern={DOWN: 5}),
        adapter(tmp_path / "in" / "other", 2, {QUERY: 3, VALUE: 3}, use_rslora=True),
    ]


# ---- sums ----


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_adapters_of_any_ranks_and_scalings_are_added_up_exactly(two: list[Path], tmp_path: Path, method: str) -> None:
    report = loratool.combine(two, tmp_path / "out", method=method, weights=[0.7, -1.3])
    assert report.written
    assert_alike(deltas(tmp_path / "out"), summed(two, [0.7, -1.3]))
    config = config_of(tmp_path / "out")
    assert {m: d.shape[0] for m, d in factors(tmp_path / "out").items()} == {QUERY: 7, DOWN: 2, VALUE: 3}
    assert config["use_rslora"] is False
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]


def factors(folder: Path) -> dict[str, Tensor]:
    """lora_A of every module."""
    end = ".lora_A.weight"
    return {n.removeprefix(START).removesuffix(end): t for n, t in tensors_of(folder).items() if n.endswith(end)}


def test_the_sum_in_float64_is_the_sum_to_1e_12(tmp_path: Path) -> None:
    each = [adapter(tmp_path / name, at, 3 + at, dtype=torch.float64) for at, name in enumerate("abc")]
    loratool.combine(each, tmp_path / "out", method="cat", weights=[1.0, 0.3, -2.0])
    assert_alike(deltas(tmp_path / "out"), summed(each, [1.0, 0.3, -2.0]), 1e-12)


def test_svd_keeps_the_largest_rank_of_the_adapters(two: list[Path], tmp_path: Path) -> None:
    loratool.combine(two, tmp_path / "out", method="svd")
    whole = summed(two, [1, 1])
    found = deltas(tmp_path / "out")
    assert {m: d.shape[0] for m, d in factors(tmp_path / "out").items()} == {QUERY: 4, DOWN: 2, VALUE: 3}
    for module, rank in ((QUERY, 4), (DOWN, 2), (VALUE, 3)):
        u, s, vt = np.linalg.svd(whole[module], full_matrices=False)
        assert off(found[module], (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-6


@pytest.mark.parametrize("names", [["q_proj"], ["q_proj", "down_proj"]])
def test_the_result_is_called_what_it_adapts(tmp_path: Path, names: list[str]) -> None:
    """Of adapters of the same modules the words stay; a union has the words of all."""
    modules = {m: 2 for m in SIZES if m.rpartition(".")[2] in names}
    each = [adapter(tmp_path / "a", 1, modules), adapter(tmp_path / "b", 2, {VALUE: 2})]
    loratool.combine(each, tmp_path / "out")
    assert set(config_of(tmp_path / "out")["target_modules"]) == {*names, "v_proj"}
    loratool.combine([each[0], adapter(tmp_path / "c", 3, modules)], tmp_path / "same")
    assert sorted(config_of(tmp_path / "same")["target_modules"]) == sorted(names)


def test_layers_to_transform_that_differ_end_in_whole_names(tmp_path: Path) -> None:
    """`q_proj` would mean every layer's."""
    each = [
        adapter(tmp_path / "a", 1, {QUERY: 2}, layers_to_transform=[0]),
        adapter(tmp_path / "b", 2, {VALUE: 2}, layers_to_transform=[1]),
    ]
    loratool.combine(each, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == sorted([QUERY, VALUE])
    assert not config.get("layers_to_transform")


def test_a_result_is_written_in_the_widest_dtype_or_the_one_asked_for(tmp_path: Path) -> None:
    half, whole = adapter(tmp_path / "a", 1, dtype=torch.bfloat16), adapter(tmp_path / "b", 2)
    other = adapter(tmp_path / "c", 3, dtype=torch.float16)
    for each, asked, wanted in (
        ([half, half], "keep", torch.bfloat16),
        ([half, whole], "keep", torch.float32),
        ([half, other], "keep", torch.float32),
        ([whole, whole], "bfloat16", torch.bfloat16),
    ):
        report = loratool.combine(each, tmp_path / "out", dtype=asked, overwrite=True)
        assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {wanted}
        assert report.dtype == str(wanted).removeprefix("torch.")


# ---- what PEFT gets wrong ----

ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"alpha_pattern": {QUERY: 1, VALUE: 7.5}},
    "rsLoRA with patterns": {"use_rslora": True, "alpha_pattern": {QUERY: 1, VALUE: 7.5}},
    "a rank that varies": {"ranks": {QUERY: 2, VALUE: 5, DOWN: 3}},
}
ITSELF: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "cat", "svd", "tsv", "linear-factors")},
    "iso_c": {"iso_beta": 0.0},
    **{name: {"density": 1.0} for name in ("ties", "dare_linear", "dare_ties", "sce", "magnitude_prune")},
    **{f"{name}-factors": {"density": 1.0} for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
    "della": {"density": 1.0, "window": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
}


@pytest.mark.parametrize("method", ITSELF)
@pytest.mark.parametrize("name", ALONE)
def test_one_adapter_with_weight_1_is_the_identity(tmp_path: Path, name: str, method: str) -> None:
    """PEFT's add_weighted_adapter is off by √r for rsLoRA (huggingface/peft #3761)."""
    given = adapter(tmp_path / "in", 5, **ALONE[name])
    report = loratool.combine(given, tmp_path / "out", method=method, **ITSELF[method])
    assert_alike(deltas(tmp_path / "out"), deltas(given), 2e-6)
    assert any("one adapter" in note for note in map(str, report.notes))


def test_biases_of_lora_b_add_up_with_weights_and_scalings(tmp_path: Path) -> None:
    """PEFT's is 44 % off."""
    biases = [{f"{START}{m}.lora_B.bias": draw(70 + at + n, SIZES[m][0]) for n, m in enumerate(SIZES)} for at in (0, 9)]
    one = adapter(tmp_path / "a", 1, extra=biases[0], lora_bias=True)
    other = adapter(tmp_path / "b", 2, extra=biases[1], lora_bias=True, use_rslora=True)
    loratool.combine([one], tmp_path / "alone")
    for module in SIZES:
        name = f"{START}{module}.lora_B.bias"
        torch.testing.assert_close(tensors_of(tmp_path / "alone")[name], 2 * biases[0][name])
    loratool.combine([one, other], tmp_path / "out", weights=[0.5, -1.0])
    for module in SIZES:
        name = f"{START}{module}.lora_B.bias"
        scales = 2.0, 8 / math.sqrt(4)
        wanted = 0.5 * scales[0] * biases[0][name] - scales[1] * biases[1][name]
        torch.testing.assert_close(tensors_of(tmp_path / "out")[name], wanted)
    assert config_of(tmp_path / "out")["lora_bias"] is True


def test_a_bias_that_only_one_adapter_has_leaves_the_others_layers_with_zeros(tmp_path: Path) -> None:
    """PEFT gives every layer one."""
    bias = {f"{START}{QUERY}.lora_B.bias": draw(1, 20)}
    each = [adapter(tmp_path / "a", 1, {QUERY: 2}, bias, lora_bias=True), adapter(tmp_path / "b", 2, {VALUE: 2})]
    loratool.combine(each, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    torch.testing.assert_close(found[f"{START}{QUERY}.lora_B.bias"], 2 * bias[f"{START}{QUERY}.lora_B.bias"])
    assert not found[f"{START}{VALUE}.lora_B.bias"].any()


@pytest.mark.parametrize("dials", [{"factor": 0.5}, {"normalize": True}], ids=["lambda", "normalize"])
def test_what_multiplies_an_update_multiplies_its_bias(tmp_path: Path, dials: dict[str, Any]) -> None:
    """W and b of a layer are trained together."""
    bias = {f"{START}{QUERY}.lora_B.bias": draw(1, 20)}
    each = [adapter(tmp_path / "a", 1, {QUERY: 2}, bias, lora_bias=True), adapter(tmp_path / "b", 2, {QUERY: 2})]
    loratool.combine(each, tmp_path / "out", **dials)
    half = {module: delta / 2 for module, delta in summed(each, [1, 1]).items()}
    assert_alike(deltas(tmp_path / "out"), half)
    found = tensors_of(tmp_path / "out")[f"{START}{QUERY}.lora_B.bias"]
    torch.testing.assert_close(found, bias[f"{START}{QUERY}.lora_B.bias"])


def dora(folder: Path, seed: int) -> Path:
    extra = {f"{START}{m}.lora_magnitude_vector": draw(80 + seed, SIZES[m][0]).abs() + 1 for m in SIZES}
    return adapter(folder, seed, extra=extra, use_dora=True)


def test_one_dora_adapter_stays_what_it_is(tmp_path: Path) -> None:
    """PEFT makes new magnitudes of the base's norms: 25 % off."""
    given = dora(tmp_path / "in", 3)
    loratool.combine(given, tmp_path / "out")
    assert_alike(deltas(tmp_path / "out"), deltas(given))
    assert config_of(tmp_path / "out")["use_dora"] is True
    for module in SIZES:
        name = f"{START}{module}.lora_magnitude_vector"
        assert torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(given)[name])


# ---- weights ----


def test_weights_by_pattern_are_those_of_the_first_that_matches(tmp_path: Path) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    weights: list[Any] = [{"q_proj": 0.25, r".*\.layers\.1\..*": -2.0, "default": 0.5}, 3]
    report = loratool.combine(each, tmp_path / "out", weights=weights)
    one, other = (deltas(folder) for folder in each)
    own = {QUERY: 0.25, VALUE: -2.0, DOWN: 0.5}
    assert_alike(deltas(tmp_path / "out"), {m: own[m] * one[m] + 3 * other[m] for m in SIZES})
    for module, weight in own.items():
        parts = report.modules[f"{module}.weight"].parts
        assert [part.weight for part in parts.values()] == [weight, 3.0]


def test_a_table_without_a_default_leaves_the_rest_at_1(tmp_path: Path) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    loratool.combine(each, tmp_path / "out", weights=[{"q_proj": 0.0}, 1])
    one, other = (deltas(folder) for folder in each)
    wanted = {m: (m != QUERY) * one[m] + other[m] for m in SIZES}
    assert_alike(deltas(tmp_path / "out"), wanted)


def test_a_file_of_weights_does_the_same_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    weights: list[Any] = [{"q_proj": 0.25, "default": 0.5}, 3]
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    words = ["combine", *map(str, each), "-o", str(tmp_path / "cli"), "--weights", str(tmp_path / "weights.json")]
    assert run([*words, "--json"]) == 0
    loratool.combine(each, tmp_path / "library", weights=weights)
    assert weights_bytes(tmp_path / "cli") == weights_bytes(tmp_path / "library")
    assert json.loads(capsys.readouterr().out)["settings"]["weights"] == weights


def weights_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_missing_adapter_is_named_before_a_missing_file_of_weights(two: list[Path], tmp_path: Path) -> None:
    for adapters, missing in (([*two, tmp_path / "third"], "third"), (two, "weights.json")):
        with pytest.raises(loratool.InputError, match=rf"{missing}: no such file or folder"):
            loratool.combine(adapters, tmp_path / "out", weights_file=tmp_path / "weights.json")


def test_options_of_the_command_line_are_those_of_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("-w 0.5 -w -2 --rank 3 --lambda 0.7", {"weights": [0.5, -2], "rank": 3, "factor": 0.7}),
        ("--method ties --space core --density 0.4 --sign frequency --no-normalize",
         {"method": "ties", "space": "core", "density": 0.4, "sign": "frequency", "normalize": False}),
        ("--method dare_linear --seed 5 --density 0.8 --dtype bfloat16",
         {"method": "dare_linear", "seed": 5, "density": 0.8, "dtype": "bfloat16"}),
        ("--method della --window 0.1 --match-norm max", {"method": "della", "window": 0.1, "match_norm": "max"}),
        ("--method breadcrumbs --outliers 0.05", {"method": "breadcrumbs", "outliers": 0.05}),
        ("--method iso_c --iso-beta 0.3 --svc", {"method": "iso_c", "iso_beta": 0.3, "svc": True}),
        ("--method nuslerp --row-wise", {"method": "nuslerp", "row_wise": True}),
        ("--rank 4 --rank-policy ctm", {"rank": 4, "rank_policy": "ctm"}),
    ]  # fmt: skip
    for at, (words, options) in enumerate(cases):
        assert run(["combine", *map(str, each), "-o", str(tmp_path / f"cli{at}"), *words.split()]) == 0, words
        assert capsys.readouterr().out
        loratool.combine(each, tmp_path / f"library{at}", **options)
        assert weights_bytes(tmp_path / f"cli{at}") == weights_bytes(tmp_path / f"library{at}"), words


# ---- strength and chance ----


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "karcher"])
def test_norms_of_layers_are_those_asked_for(tmp_path: Path, method: str) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, size=3.0)]
    sizes = [{m: np.linalg.norm(d) for m, d in deltas(folder).items()} for folder in each]
    for match, statistic in (("mean", np.mean), ("max", np.max), ("sum", np.sum)):
        loratool.combine(
            each, tmp_path / "out", method=method, weights=[1, 0.5], match_norm=match, factor=2.0, overwrite=True
        )
        for module, delta in deltas(tmp_path / "out").items():
            wanted = 2 * statistic([sizes[0][module], 0.5 * sizes[1][module]])
            assert np.linalg.norm(delta) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "dare_linear-factors", "dare_ties-factors"])
def test_a_seed_gives_the_same_bytes_again(tmp_path: Path, method: str) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        loratool.combine(each, tmp_path / name, method=method, seed=seed)
    assert weights_bytes(tmp_path / "first") == weights_bytes(tmp_path / "again")
    assert weights_bytes(tmp_path / "first") != weights_bytes(tmp_path / "other")


def test_layers_and_adapters_draw_for_themselves(tmp_path: Path) -> None:
    """Two layers of one shape with the same update: the same entries are not kept."""
    draws = draw(1, 2, 20), draw(2, 20, 2)
    modules = [f"model.layers.{at}.self_attn.q_proj" for at in range(2)]
    tensors = {f"{START}{m}.lora_{side}.weight": t for m in modules for side, t in zip("AB", draws, strict=True)}
    given = [write(tmp_path / name, tensors, r=2, lora_alpha=2, target_modules=["q_proj"]) for name in "ab"]
    loratool.combine(given, tmp_path / "out", method="dare_linear", density=0.5, rank=20)
    first, second = deltas(tmp_path / "out").values()
    (delta, _) = deltas(given[0]).values()
    kept = [np.rint(found / (2 * delta)) for found in (first, second)]  # how many of two kept an entry
    assert set(np.unique(kept[0])) == {0, 1, 2}, "two adapters draw apart"
    assert np.mean(kept[0] != kept[1]) > 0.2, "two layers draw apart"


# ---- what stands beside ----

HEAD = "classifier.weight"


def saving(folder: Path, seed: int, head: Tensor, **config: Any) -> Path:
    return adapter(folder, seed, {QUERY: 2}, {START + HEAD: head}, modules_to_save=["classifier"], **config)


@pytest.mark.parametrize("method", ["linear", "ties", "karcher"])
def test_a_saved_module_that_is_the_same_everywhere_or_in_one_only_is_kept(tmp_path: Path, method: str) -> None:
    head = draw(5, 3, 20)
    one, same = saving(tmp_path / "a", 1, head), saving(tmp_path / "b", 2, head)
    without = adapter(tmp_path / "c", 3, {QUERY: 2})
    for at, each in enumerate(([one, same], [one, without], [without, one])):
        report = loratool.combine(each, tmp_path / f"out{at}", method=method)
        assert torch.equal(tensors_of(tmp_path / f"out{at}")[START + HEAD], head)
        assert config_of(tmp_path / f"out{at}")["modules_to_save"] == ["classifier"]
        assert any("classifier.weight" in note for note in map(str, report.notes)) == (without in each)


def test_saved_modules_that_differ_are_refused_or_made_one_as_asked(tmp_path: Path) -> None:
    heads = draw(5, 3, 20), draw(6, 3, 20)
    each = [saving(tmp_path / "a", 1, heads[0]), saving(tmp_path / "b", 2, heads[1])]
    with pytest.raises(loratool.FitError, match=r"(?s)--saved first or --saved mean.*classifier\.weight") as refused:
        loratool.combine(each, tmp_path / "out")
    assert "a, b" in str(refused.value)
    assert not (tmp_path / "out").exists()
    loratool.combine(each, tmp_path / "first", saved="first")
    assert torch.equal(tensors_of(tmp_path / "first")[START + HEAD], heads[0])
    loratool.combine(each, tmp_path / "mean", saved="mean", weights=[1, 3])
    wanted = 0.25 * heads[0] + 0.75 * heads[1]
    torch.testing.assert_close(tensors_of(tmp_path / "mean")[START + HEAD], wanted)


def test_a_mean_of_saved_modules_and_a_sum_of_biases_are_rounded_once(tmp_path: Path) -> None:
    """What float32 takes for half-way between two numbers of float16."""
    bias, each = f"{START}{QUERY}.lora_B.bias", []
    for at, value in enumerate((1, 1 + 2.0**-10)):
        extra = {bias: torch.full((20,), value / 2).half(), START + HEAD: torch.full((3, 20), value).half()}
        more: dict[str, Any] = {"lora_bias": True, "modules_to_save": ["classifier"]}
        each.append(adapter(tmp_path / f"{at}", at, {QUERY: 2}, extra, **more))
    loratool.combine(each, tmp_path / "out", saved="mean", weights=[0.5 - 2.0**-30, 0.5 + 2.0**-30])
    found = tensors_of(tmp_path / "out")
    for name in (bias, START + HEAD):
        assert {*found[name].flatten().tolist()} == {1 + 2.0**-10}, name


def test_a_mean_needs_weights_that_have_a_sum(tmp_path: Path) -> None:
    each = [saving(tmp_path / "a", 1, draw(5, 3, 20)), saving(tmp_path / "b", 2, draw(6, 3, 20))]
    with pytest.raises(loratool.UsageError, match="sum above 0"):
        loratool.combine(each, tmp_path / "out", saved="mean", weights=[1, -1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_updates_beyond_float32_are_an_error_of_the_input_and_no_bug(
    method: str, two: list[Path], tmp_path: Path
) -> None:
    tensors = {
        name: torch.full_like(value, 3e38) if ".lora_B" in name else value for name, value in tensors_of(two[0]).items()
    }
    save_file(tensors, two[0] / "adapter_model.safetensors")
    with pytest.raises((loratool.InputError, loratool.FitError), match=r"too large|overflow"):
        loratool.combine(two, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_saved_modules_whole_numbers_are_those_of_the_first_adapter(tmp_path: Path) -> None:
    """A mean of integers would be none."""
    folders = []
    for number, name in enumerate(("a", "b")):
        folder = adapter(tmp_path / name, seed=number)
        counts = {"base_model.model.counter.steps": torch.arange(3) + number}
        save_file({**tensors_of(folder), **counts}, folder / "adapter_model.safetensors")
        config = {**config_of(folder), "modules_to_save": ["counter"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    report = loratool.combine(folders, tmp_path / "out", saved="mean")
    assert [note.code for note in report.notes] == ["whole-numbers-kept"]
    assert tensors_of(tmp_path / "out")["base_model.model.counter.steps"].tolist() == [0, 1, 2]


def test_saved_modules_of_other_shapes_are_refused_whatever_is_asked(tmp_path: Path) -> None:
    each = [saving(tmp_path / "a", 1, draw(5, 3, 20)), saving(tmp_path / "b", 2, draw(6, 4, 20))]
    for saved in ("refuse", "first", "mean"):
        with pytest.raises(loratool.FitError, match=r"classifier\.weight: saved whole in several shapes") as told:
            loratool.combine(each, tmp_path / "out", saved=saved)
        assert "--saved" not in str(told.value)  # none of its values helps


def test_adapters_of_other_bases_without_a_common_layer_may_be_of_other_models(tmp_path: Path) -> None:
    """Shapes agree only where there are some to compare; one base in two spellings is no reason to refuse."""
    one, other, third = (
        adapter(tmp_path / name, seed, ranks, base_model_name_or_path=base)
        for seed, (name, ranks, base) in enumerate(
            [("a", {QUERY: 2}, "some/base"), ("b", {DOWN: 2}, "other/base"), ("c", {QUERY: 1, DOWN: 1}, "some/base")]
        )
    )
    notes = {note.code: str(note) for note in loratool.combine([one, other], tmp_path / "out").notes}
    assert notes["no-common-layer"].endswith("they have no layer in common, so they may be of different models")
    assert "base-mismatch" not in notes
    notes = {note.code: str(note) for note in loratool.combine([one, other, third], tmp_path / "all").notes}
    assert notes["base-mismatch"].endswith("(other/base, some/base); their shapes agree")


def test_a_module_that_one_saves_and_another_adapts_is_refused(tmp_path: Path) -> None:
    extra = {f"{START}{VALUE}.weight": draw(5, 12, 20)}
    each = [
        adapter(tmp_path / "a", 1, {QUERY: 2}, extra, modules_to_save=["v_proj"]),
        adapter(tmp_path / "b", 2, {QUERY: 2, VALUE: 2}),
    ]
    with pytest.raises(loratool.FitError, match=r"v_proj\.weight: saved whole in a, adapted in others"):
        loratool.combine(each, tmp_path / "out")


def with_tokens(folder: Path, seed: int, rows: Mapping[int, Tensor]) -> Path:
    name = f"{START}model.embed_tokens.token_adapter.trainable_tokens_delta"
    return adapter(
        folder,
        seed,
        {QUERY: 2},
        {name: torch.stack(list(rows.values()))},
        trainable_token_indices={"embed_tokens": list(rows)},
    )


def tokens_of(folder: Path) -> dict[int, Tensor]:
    (found,) = (t for name, t in tensors_of(folder).items() if name.endswith("trainable_tokens_delta"))
    (numbers,) = config_of(folder)["trainable_token_indices"].values()
    return dict(zip(numbers, found, strict=True))


def test_rows_of_tokens_are_all_kept_and_refused_where_they_differ(tmp_path: Path) -> None:
    rows = {number: draw(number, 20) for number in range(9)}
    one = with_tokens(tmp_path / "a", 1, {7: rows[7], 3: rows[3]})
    other = with_tokens(tmp_path / "b", 2, {3: rows[3], 5: rows[5]})
    loratool.combine([one, other], tmp_path / "out")
    found = tokens_of(tmp_path / "out")
    assert set(found) == {3, 5, 7}
    assert all(torch.equal(found[number], rows[number]) for number in found)
    rival = with_tokens(tmp_path / "c", 3, {3: rows[8], 6: rows[6]})
    with pytest.raises(loratool.FitError, match=r"embed_tokens\.weight: 1 token rows, the first of them 3"):
        loratool.combine([one, rival], tmp_path / "refused")
    loratool.combine([one, rival], tmp_path / "first", saved="first")
    assert torch.equal(tokens_of(tmp_path / "first")[3], rows[3])
    loratool.combine([one, rival], tmp_path / "mean", saved="mean", weights=[3, 1])
    torch.testing.assert_close(tokens_of(tmp_path / "mean")[3], 0.75 * rows[3] + 0.25 * rows[8])
    assert torch.equal(tokens_of(tmp_path / "mean")[6], rows[6])


def test_files_beside_the_adapters_are_kept_where_they_agree(tmp_path: Path) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    for folder in each:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "LICENSE").write_text(folder.name)
    (each[1] / "chat_template.jinja").write_text("hello")
    loratool.combine(each, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert "LICENSE" not in names


# ---- reports ----


@dataclasses.dataclass
class Dense:
    """What a linear combination of two adapters, cut to a rank, is on whole matrices."""

    whole: Array
    cut: Array
    stored: Array

    @classmethod
    def of(cls, whole: Array, rank: int, stored: Array) -> Dense:
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        return cls(whole, (u[:, :rank] * s[:rank]) @ vt[:rank], stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_of_a_report_are_those_of_whole_matrices(tmp_path: Path, dtype: str) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, {QUERY: 6, DOWN: 1}, size=2.0)]
    weights, rank = [1.0, -0.6], 3
    report = loratool.combine(each, tmp_path / "out", weights=weights, rank=rank, dtype=dtype)
    whole, stored = summed(each, weights), deltas(tmp_path / "out")
    dense = {m: Dense.of(whole[m], rank, stored[m]) for m in whole}
    own = [deltas(folder) for folder in each]
    for module, layer in ((m, report.modules[f"{m}.weight"]) for m in whole):
        found = dense[module]
        size = np.linalg.norm(found.whole)
        assert layer.rank == rank
        assert layer.norm == pytest.approx(float(np.linalg.norm(found.stored)), rel=1e-6)
        assert layer.truncated == pytest.approx(
            float(np.linalg.norm(found.whole - found.cut) / size), rel=1e-5, abs=1e-9
        )
        rounding = float(np.linalg.norm(found.cut - found.stored) / np.linalg.norm(found.cut))
        assert layer.stored == pytest.approx(rounding, rel=0.02, abs=1e-7)
        # truncation and rounding are nearly, not quite, at a right angle
        assert layer.error == pytest.approx(
            float(np.linalg.norm(found.whole - found.stored) / size), rel=2e-3, abs=1e-7
        )
        u, s, vt = np.linalg.svd(found.stored)
        present = int((s > 1e-6 * s[0]).sum())
        for name, delta, weight in zip(("a", "b"), own, weights, strict=True):
            if module not in delta:
                assert name not in layer.parts
                continue
            part = layer.parts[name]
            inside = u[:, :present].T @ delta[module] @ vt[:present].T
            size_own = float(np.linalg.norm(delta[module]))
            assert part.weight == weight
            assert part.norm == pytest.approx(size_own, rel=1e-9)
            assert part.energy_kept == pytest.approx(float((inside**2).sum()) / size_own**2, rel=1e-6)
            assert part.norm_ratio == pytest.approx(layer.norm / (abs(weight) * size_own), rel=1e-9)
    total = math.sqrt(sum(np.linalg.norm(d.whole) ** 2 for d in dense.values()))
    lost = math.sqrt(sum(np.linalg.norm(d.whole - d.cut) ** 2 for d in dense.values()))
    apart = math.sqrt(sum(np.linalg.norm(d.whole - d.stored) ** 2 for d in dense.values()))
    totals = report.totals
    assert totals.norm == pytest.approx(math.sqrt(sum(np.linalg.norm(d.stored) ** 2 for d in dense.values())), rel=1e-6)
    assert totals.truncated == pytest.approx(lost / total, rel=1e-4)
    assert totals.error == pytest.approx(apart / total, rel=2e-3)
    assert totals.parameters == sum(rank * sum(SIZES[m]) for m in whole)
    assert totals.bytes == totals.parameters * (4 if dtype == "float32" else 2)
    product = sum(float((own[0][m] * own[1][m]).sum()) for m in own[1])
    sizes = [math.sqrt(sum(float((d**2).sum()) for d in each_own.values())) for each_own in own]
    assert totals.cosine == {"a × b": pytest.approx(product / (sizes[0] * sizes[1]), abs=1e-9)}


def test_how_adapters_meet_is_told_by_cosines_overlaps_and_signs(tmp_path: Path) -> None:
    common = draw(9, 20, 2)
    each = [adapter(tmp_path / "a", 1, {QUERY: 4}), adapter(tmp_path / "b", 2, {QUERY: 6})]
    for folder in each:  # two output directions in common
        tensors = tensors_of(folder)
        tensors[f"{START}{QUERY}.lora_B.weight"][:, :2] = common
        save_file(tensors, folder / "adapter_model.safetensors")
    one, other = (deltas(folder)[QUERY] for folder in each)
    report = loratool.combine(each, tmp_path / "out")
    (meeting,) = report.modules[f"{QUERY}.weight"].meetings.values()
    sides = [np.linalg.svd(d, full_matrices=False) for d in (one, other)]
    (u1, _, v1), (u2, _, v2) = ((u[:, :k], s[:k], vt[:k]) for (u, s, vt), k in zip(sides, (4, 6), strict=True))
    cosine = float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    assert meeting.cosine == pytest.approx(cosine, abs=1e-9)
    assert meeting.overlap_out == pytest.approx(float((u1.T @ u2).__pow__(2).sum()) / 4, rel=1e-6)
    assert meeting.overlap_in == pytest.approx(float((v1 @ v2.T).__pow__(2).sum()) / 4, rel=1e-6)
    assert meeting.overlap_out is not None
    assert meeting.overlap_out > 0.5 > meeting.random_out == 6 / 20
    assert meeting.sign_conflict == pytest.approx(float((one * other < 0).mean()), abs=0.03)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", ["linear", "svd", "tsv", "iso_c", "magnitude_prune"])
def test_a_result_that_is_zero_keeps_nothing_of_what_went_in(method: str, rank: int | None, tmp_path: Path) -> None:
    """What is left of two copies is rounding, which is told neither as a norm nor as an error of the cut."""
    given = adapter(tmp_path / "a", 1)
    report = loratool.combine([given, given], tmp_path / "out", method=method, weights=[1, -1], rank=rank)
    assert report.totals.norm == report.totals.error == 0
    assert all(energy == 0 for energy in report.totals.energy_kept.values())
    assert any("3 of 3 layers come out as zero" in note for note in map(str, report.notes))
    assert all(np.abs(d).max() == 0 for d in deltas(tmp_path / "out").values())


def test_an_adapter_that_was_not_trained_is_told(tmp_path: Path) -> None:
    given, empty = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, size=0)
    report = loratool.combine([given, empty], tmp_path / "out", weights=[0.5, 2])
    assert_alike(deltas(tmp_path / "out"), summed([given], [0.5]))
    (note,) = (note for note in map(str, report.notes) if "zero" in note)
    assert note.startswith("b: every update is zero")
    assert any(line.split() == ["adapter", "b:", "adds", "nothing"] for line in str(report).splitlines())


def test_energy_is_not_kept_in_directions_that_the_result_does_not_have(tmp_path: Path) -> None:
    """Of a result of rank 2 that is filled up to rank 8, two directions count."""
    one = adapter(tmp_path / "a", 1, {QUERY: 2})
    other = adapter(tmp_path / "b", 2, {QUERY: 4})
    report = loratool.combine([one, other], tmp_path / "out", weights=[1, 0], rank=8)
    delta = deltas(other)[QUERY]
    u, _, vt = np.linalg.svd(deltas(one)[QUERY])
    wanted = float(((u[:, :2].T @ delta @ vt[:2].T) ** 2).sum() / (delta**2).sum())
    parts = report.modules[f"{QUERY}.weight"].parts
    assert parts["a"].energy_kept == pytest.approx(1.0, rel=1e-6)
    assert parts["b"].energy_kept == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "tsv", "karcher", "linear-factors"])
def test_a_dry_run_tells_the_same_numbers_and_writes_nothing(tmp_path: Path, method: str) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    before = snapshot(tmp_path)
    planned = loratool.combine(each, tmp_path / "out", method=method, rank=4, dry_run=True)
    assert snapshot(tmp_path) == before
    done = loratool.combine(each, tmp_path / "out", method=method, rank=4)
    assert not planned.written
    assert done.written
    assert planned.modules == done.modules
    assert planned.totals == done.totals
    assert planned.settings == done.settings


def test_a_report_reads_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, {QUERY: 3})]
    assert "ties" in str(loratool.combine(each, tmp_path / "text", method="ties", rank=4))
    assert run(["combine", *map(str, each), "-o", str(tmp_path / "json"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["modules"][f"{QUERY}.weight"]["rank"] == 7
    assert table["totals"]["energy_kept"].keys() == {"a", "b"}


def test_layers_that_not_all_adapters_have_are_told(two: list[Path], tmp_path: Path) -> None:
    report = loratool.combine(two, tmp_path / "out")
    assert any(note.startswith("2 of 3 layers are not in all adapters") for note in map(str, report.notes))


def test_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    each = [adapter(tmp_path / "x" / "lora", 1), adapter(tmp_path / "y" / "lora", 2)]
    report = loratool.combine(each, tmp_path / "out")
    assert report.adapters == ("lora", "lora (2)")
    assert set(report.totals.energy_kept) == {"lora", "lora (2)"}


def test_bases_of_other_names_are_told_and_no_reason_to_refuse(tmp_path: Path) -> None:
    each = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, base_model_name_or_path="another/base")]
    report = loratool.combine(each, tmp_path / "out")
    (note,) = (note for note in map(str, report.notes) if "bases" in note)
    assert "another/base" in note
    assert "some/base" in note


# ---- a layer that only some adapters have ----


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "karcher", "model_stock"])
def test_a_mean_of_one_is_that_one(tmp_path: Path, method: str) -> None:
    """Where a method divides by the weights, what only one adapter has is its own update, whatever its weight."""
    tensors = tensors_of(adapter(tmp_path / "a", 1, {QUERY: 2, VALUE: 2}))
    near = {n: t * 1.1 for n, t in tensors.items() if QUERY in n}
    other = write(tmp_path / "b", near, r=2, lora_alpha=4, target_modules=["q_proj"])
    weights = None if method == "model_stock" else [0.5, 1.5]
    loratool.combine([tmp_path / "a", other], tmp_path / "out", method=method, weights=weights)
    assert off(deltas(tmp_path / "out")[VALUE], deltas(tmp_path / "a")[VALUE]) < 1e-6


# ---- refusals ----


class Bench:
    """Two sound adapters, and the command line on them."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.one, self.other = adapter(root / "in" / "one", 1), adapter(root / "in" / "other", 2)
        (root / "work").mkdir()
        self.out = root / "work" / "out"

    def refuses(
        self, *words: str | Path, told: Sequence[str], code: int, adapters: Sequence[Path] | None = None
    ) -> str:
        before = snapshot(self.root)
        given = [self.one, self.other] if adapters is None else adapters
        out = [] if "-o" in words else ["-o", str(self.out)]
        self.capsys.readouterr()
        found = run(["combine", *map(str, given), *out, *map(str, words)])
        written, said = self.capsys.readouterr()
        outcome = Outcome(found, written, said, 0.0)
        if code == 2 and said.startswith("Usage:"):  # by click itself
            assert found == 2
            assert all(part in said for part in told), said
        else:
            check_refusal(outcome, told, code)
        assert snapshot(self.root) == before
        return said


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


WRONG_WORDS: dict[str, tuple[str, list[str]]] = {
    "density 0": ("--method ties --density 0", ["--density must be above 0 and at most 1 (got 0)"]),
    "density above 1": ("--method ties --density 1.5", ["--density must be above 0 and at most 1 (got 1.5)"]),
    "density that is no number": ("--method ties --density nan", ["--density must be above 0 and at most 1 (got nan)"]),
    "density without effect": ("--density 0.5", ["--density", "which keeps all entries"]),
    "an unknown method": ("--method soup", ["soup"]),
    "a space without effect": ("--space core", ["--space", "linear"]),
    "a space for vectors": ("--method tsv --space dense", ["--space", "tsv"]),
    "an unknown space": ("--method ties --space outer", ["outer"]),
    "ctm without a rank": ("--rank-policy ctm", ["--rank-policy ctm", "--rank"]),
    "ctm in another space": ("--method ties --space knots --rank-policy ctm --rank 2", ["ctm", "space"]),
    "ctm of factors": ("--method linear-factors --rank-policy ctm --rank 2", ["ctm"]),
    "rank 0": ("--rank 0", ["0"]),
    "a weight missing": ("-w 1", ["1 weight for 2 adapters"]),
    "a weight too many": ("-w 1 -w 2 -w 3", ["3 weights for 2 adapters"]),
    "a weight that is no number": ("-w 1 -w nan", ["--weight must be a finite number (got nan)"]),
    "an infinite weight": ("-w inf -w 1", ["--weight must be a finite number (got inf)"]),
    "lambda 0": ("--lambda 0", ["--lambda must be a finite number other than 0 (got 0)"]),
    "an infinite lambda": ("--lambda inf", ["--lambda must be a finite number other than 0 (got inf)"]),
    "a window outside of chances": ("--method della --density 0.1 --window 0.2", ["--window 0.2"]),
    "too many outliers": ("--method breadcrumbs --density 0.9 --outliers 0.2", ["--outliers 0.2"]),
    "negative outliers": ("--method breadcrumbs --outliers -0.1", ["--outliers -0.1"]),
    "iso-beta above 1": ("--method iso_c --iso-beta 2", ["--iso-beta must be between 0 and 1 (got 2)"]),
    "rows of another method": ("--method slerp --row-wise", ["--row-wise"]),
    "a window of another method": ("--method dare_ties --window 0.05", ["--window", "della"]),
    "outliers of another method": ("--method ties --outliers 0.05", ["--outliers", "breadcrumbs"]),
    "a sign that nobody elects": ("--method dare_linear --sign frequency", ["--sign", "dare_ties"]),
    "nothing to divide": ("--method tsv --normalize", ["--normalize", "linear"]),
    "a part of no way": ("--method tsv --iso-beta 0.5", ["--iso-beta", "iso_c"]),
    "svc of factors": ("--method ties-factors --svc", ["--svc"]),
    "a norm for factors": ("--method linear-factors --match-norm mean", ["--match-norm"]),
    "weights that cancel, normalised": ("--normalize -w 1 -w -1", ["weights"]),
    "weights that cancel, dare": ("--method dare_linear --normalize -w 1 -w -1", ["weights"]),
    "weights that cancel, slerp": ("--method slerp -w 1 -w -1", ["weights"]),
    "weights that cancel, nuslerp": ("--method nuslerp -w 2 -w -2", ["weights"]),
    "weights that cancel, karcher": ("--method karcher -w 1 -w -1", ["weights"]),
    "weights without effect": ("--method model_stock -w 1 -w 2", ["model_stock", "no weights"]),
}


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_words_that_mean_nothing_are_refused(bench: Bench, name: str) -> None:
    words, told = WRONG_WORDS[name]
    bench.refuses(*words.split(), told=told, code=2)


def test_the_number_of_adapters_has_to_be_the_methods(bench: Bench) -> None:
    third = adapter(bench.root / "in" / "third", 3)
    for method, wanted in (("slerp", "2"), ("nuslerp", "2"), ("karcher", "2 or more"), ("iso_cts", "2 or more")):
        told = [f"{method} takes {wanted} adapters (got 1)"]
        bench.refuses("--method", method, told=told, code=2, adapters=[bench.one])
    told = ["slerp takes 2 adapters (got 3)"]
    bench.refuses("--method", "slerp", told=told, code=2, adapters=[bench.one, bench.other, third])


TABLES: dict[str, tuple[str, int, list[str]]] = {
    "not valid JSON": ("[1,", 3, ["not valid JSON"]),
    "no list": ('{"q_proj": 1}', 3, ["--weights must be a list"]),
    "none": ("[]", 2, ["--weights: the list is empty"]),
    "too few": ("[1]", 2, ["1 weight for 2 adapters"]),
    "a pattern of nothing": ('[{"k_proj": 2}, 1]', 2, ["weights of one", "k_proj"]),
    "no pattern": ('[{"(": 2}, 1]', 2, ["weights of one", "("]),
    "no number": ('[1, {"q_proj": "much"}]', 2, ["--weights of q_proj must be a finite number (got much)"]),
    "a truth": ("[true, 1]", 2, ["--weights must be a finite number (got True)"]),
    "nothing": ("[null, 1]", 2, ["--weights must be a finite number (got None)"]),
    "NaN": ('[{"default": NaN}, 1]', 3, ["weights.json", "NaN is not valid JSON"]),
    "a list in a list": ("[[1], 1]", 2, ["--weights must be a finite number (got [1])"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_weights_that_mean_nothing_are_refused(bench: Bench, name: str) -> None:
    text, code, told = TABLES[name]
    path = bench.root / "weights.json"
    path.write_text(text)
    bench.refuses("--weights", path, told=told, code=code)


def test_weights_are_given_once(bench: Bench) -> None:
    (bench.root / "weights.json").write_text("[1, 1]")
    bench.refuses("-w", "1", "-w", "1", "--weights", bench.root / "weights.json", told=["-w and --weights"], code=2)


def test_the_output_is_no_input(bench: Bench) -> None:
    for place in (bench.one, bench.one / "inside", bench.root / "in"):
        told = [os.fspath(place.name), "input"]
        bench.refuses("-o", place, "--overwrite", told=told, code=2)


def test_adapters_of_other_shapes_are_refused_with_every_weight(bench: Bench) -> None:
    tensors = tensors_of(bench.other)
    for module in (QUERY, DOWN):
        name = f"{START}{module}.lora_A.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name][:, :1]], 1)
    wide = write(bench.root / "in" / "wide", tensors, r=4, lora_alpha=8, target_modules=["q_proj"])
    told = [
        "do not have the same base",
        f"{QUERY}.weight",
        "20 × 20 in one",
        "20 × 21 in wide",
        f"{DOWN}.weight",
        "20 × 31",
    ]
    said = bench.refuses(told=told, code=4, adapters=[bench.one, wide])
    assert VALUE not in said


def test_nothing_but_zeros_is_refused(bench: Bench) -> None:
    untrained = [adapter(bench.root / "in" / name, at, size=0.0) for at, name in enumerate("xy")]
    for method in ("linear", "ties", "tsv", "iso_c", "karcher", "linear-factors", "sce"):
        bench.refuses("--method", method, told=["every update is zero"], code=4, adapters=untrained)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused_by_the_name_of_its_tensor(bench: Bench, value: float) -> None:
    tensors = tensors_of(bench.other)
    tensors[f"{START}{DOWN}.lora_B.weight"][2, 1] = value
    broken = write(bench.root / "in" / "broken", tensors, **config_of(bench.other))
    for method in ("linear", "ties", "karcher", "tsv", "ties-factors"):
        told = ["broken", f"{DOWN}.lora_B.weight contains NaN or infinite values"]
        bench.refuses("--method", method, told=told, code=3, adapters=[bench.one, broken])


BESIDE: dict[str, Callable[[Path], Path]] = {
    "a saved module": lambda folder: saving(folder, 1, torch.full((3, 20), math.nan)),
    "a row of a token": lambda folder: with_tokens(folder, 1, {4: torch.full((20,), math.nan)}),
    "a bias": lambda folder: adapter(
        folder, 1, {QUERY: 2}, {f"{START}{QUERY}.lora_B.bias": torch.full((20,), math.inf)}, lora_bias=True
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_no_number_beside_the_factors_is_refused_too(bench: Bench, name: str) -> None:
    broken = BESIDE[name](bench.root / "in" / "broken")
    bench.refuses(told=["broken", "contains NaN or infinite values"], code=3, adapters=[bench.one, broken])


def test_dora_adds_up_with_nothing(bench: Bench) -> None:
    turned = dora(bench.root / "in" / "dora", 3)
    told = ["dora", "DoRA divides by the norm", "loratool merge", "loratool extract"]
    bench.refuses(told=told, code=4, adapters=[bench.one, turned])
    bench.refuses(told=told, code=4, adapters=[turned, turned])
    for words in (["-w", "0.5"], ["--method", "ties"], ["--lambda", "2"]):
        bench.refuses(*words, told=["DoRA"], code=4, adapters=[turned])


@pytest.mark.parametrize("words", ["--rank 2", "--match-norm sum", "--svc"])
def test_one_dora_adapter_is_no_other_update(bench: Bench, words: str) -> None:
    """Its magnitudes are those of W + ΔW: with less of ΔW, or more, they mean something else."""
    turned = dora(bench.root / "in" / "dora", 3)
    bench.refuses(*words.split(), told=["DoRA"], code=4, adapters=[turned])


def test_factors_of_other_ranks_do_not_add_up(bench: Bench) -> None:
    tall = adapter(bench.root / "in" / "tall", 3, {QUERY: 4, VALUE: 5, DOWN: 6})
    told = ["equal ranks", f"{VALUE}.weight: ranks 4, 5", f"{DOWN}.weight: ranks 4, 6", "--method linear"]
    said = bench.refuses("--method", "linear-factors", told=told, code=4, adapters=[bench.one, tall])
    assert QUERY not in said


def test_model_stock_is_for_runs_of_one_task(bench: Bench) -> None:
    bench.refuses("--method", "model_stock", told=["model_stock", "mean cosine", "below 0.2"], code=4)
    tensors = {name: t + 0.05 * draw(7, *t.shape) for name, t in tensors_of(bench.one).items()}
    again = write(bench.root / "in" / "again", tensors, **config_of(bench.one))
    assert run(["combine", str(bench.one), str(again), "-o", str(bench.out), "--method", "model_stock"]) == 0


def test_values_above_what_float16_holds_are_refused(bench: Bench) -> None:
    large = adapter(bench.root / "in" / "large", 3, {QUERY: 2}, size=1e6)
    told = [f"{QUERY}.weight", "overflow float16", "--dtype"]
    bench.refuses("--dtype", "float16", told=told, code=4, adapters=[large, bench.other])


def test_a_bias_above_what_its_dtype_holds_is_refused(bench: Bench) -> None:
    bias = {f"{START}{QUERY}.lora_B.bias": torch.full((20,), 6e4, dtype=torch.float16)}
    large = adapter(bench.root / "in" / "large", 3, {QUERY: 2}, bias, lora_bias=True)
    bench.refuses("-w", "2", "-w", "1", told=["q_proj", "overflow"], code=4, adapters=[large, bench.other])


def test_an_adapter_that_is_not_low_rank_is_refused_by_name(bench: Bench) -> None:
    module = f"{START}{QUERY}"
    config = {"target_modules": ["q_proj"], "peft_type": "HRA", "apply_GS": False}
    hra = write(bench.root / "in" / "hra", {f"{module}.hra_u": draw(0, 20, 2)}, r=2, **config)
    bench.refuses(told=["hra", "cannot combine", "loratool extract BASE MERGED"], code=3, adapters=[bench.one, hra])


def test_nothing_is_given(bench: Bench) -> None:
    with pytest.raises(loratool.UsageError):
        loratool.combine([], bench.out)
    assert run(["combine", "-o", str(bench.out)]) == 2


def test_an_output_that_is_there_is_replaced_only_when_asked(bench: Bench) -> None:
    loratool.combine([bench.one, bench.other], bench.out)
    before = weights_bytes(bench.out)
    bench.refuses("-w", "2", "-w", "1", told=["--overwrite"], code=2)
    assert (
        run(["combine", str(bench.one), str(bench.other), "-o", str(bench.out), "-w", "2", "-w", "1", "--overwrite"])
        == 0
    )
    assert weights_bytes(bench.out) != before
