"""A merged model is proven, or what is wrong with it is told: merges by other tools' arithmetic, with one fault at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import ALPHA, HIDDEN, RANK, TOKENS, Scene, Tensors, codes, only, rounded, scene, write_adapter
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool import cli
from loratool.errors import FitError, UsageError
from loratool.results.verify import Verification

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The same in float32."""
    return scene(tmp_path_factory.mktemp("single"), torch.float32)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The same in float64."""
    return scene(tmp_path_factory.mktemp("double"), torch.float64)


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One whose updates are smaller than most steps of bfloat16."""
    return scene(tmp_path_factory.mktemp("faint"), size=0.004)


@pytest.fixture
def pick() -> random.Random:
    return random.Random(1)


def verified(
    of: Scene, tensors: Tensors, folder: Path, config: Mapping[str, Any] | None = None, **more: Any
) -> Verification:
    """What `verify` says of tensors as a model."""
    return loratool.verify(of.write(tensors, folder / "merged", config), of.base, of.adapter, device="cpu", **more)


def assert_proven(found: Verification) -> None:
    assert (found.verdict, found.exit_code, found.diagnoses) == ("proven", 0, ()), str(found)


def module(name: str) -> str:
    return name.removesuffix(".weight")


# ---------------------------------------------------------------- sound merges


@pytest.mark.parametrize("of", ["small", "single", "double", "faint"])
def test_an_output_of_merge_is_proven_and_every_element_is_the_formulas(
    of: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here: Scene = request.getfixturevalue(of)
    loratool.merge(here.base, here.adapter, tmp_path / "merged", device="cpu")
    found = loratool.verify(tmp_path / "merged", here.base, [here.adapter], device="cpu")
    assert_proven(found)
    assert found.tensors is not None
    assert {proof.equal for proof in found.tensors.values()} == {1.0}
    assert {name: found.tensors[name].factor for name in here.factors} == dict.fromkeys(here.factors, (1.0,))
    assert found.counts == {"identical": len(here.weights) - len(here.factors), "proven": len(here.factors)}


@pytest.mark.parametrize("how", ["compensated", "stochastic"])
def test_other_roundings_of_merge_are_recognised_and_proven(how: str, faint: Scene, tmp_path: Path) -> None:
    loratool.merge(faint.base, faint.adapter, tmp_path / "merged", rounding=how, device="cpu")
    for asked in ("auto", how):
        found = loratool.verify(tmp_path / "merged", faint.base, faint.adapter, device="cpu", rounding=asked)
        assert_proven(found)
        assert found.rounding == how
        assert found.tensors is not None
        assert {proof.equal for proof in found.tensors.values()} == {1.0}


@pytest.mark.parametrize(
    ("how", "asked", "exit_code"),
    [("stochastic", "nearest", 0), ("nearest", "stochastic", 0), ("compensated", "nearest", 5)],
)
def test_a_model_that_is_rounded_in_another_way_than_it_is_said_to_be_is_told_so(
    how: str, asked: str, exit_code: int, faint: Scene, tmp_path: Path
) -> None:
    """And nothing else is said of it. Both neighbours of a sum are within 1 ulp; a corrected update may be farther."""
    loratool.merge(faint.base, faint.adapter, tmp_path / "merged", rounding=how, device="cpu")
    found = loratool.verify(tmp_path / "merged", faint.base, faint.adapter, device="cpu", rounding=asked)
    assert (found.exit_code, found.rounding, codes(found)) == (exit_code, how, ["rounded-otherwise"]), str(found)


def test_the_exact_sum_in_float64_rounded_once_is_proven(small: Scene, tmp_path: Path) -> None:
    assert_proven(verified(small, small.merged(), tmp_path))


def unsloth(of: Scene) -> Callable[[str, Tensor], Tensor]:
    """`_merge_lora` of unsloth: float32, W transposed, one `addmm`, then the model's dtype."""

    def merge(name: str, weight: Tensor) -> Tensor:
        down, up = (factor.float() for factor in of.factors[name])
        return torch.addmm(weight.float().t(), down.t(), up.t(), alpha=ALPHA / RANK).t().to(weight.dtype)

    return merge


def mergekit(of: Scene) -> Callable[[str, Tensor], Tensor]:
    """mergekit: PEFT's merge of a model loaded in float32, then the difference from the base added again in its dtype."""

    def merge(name: str, weight: Tensor) -> Tensor:
        down, up = (factor.float() for factor in of.factors[name])
        merged = (weight.float() + (up @ down) * (ALPHA / RANK)).to(weight.dtype)
        return weight + (merged - weight)

    return merge


def in_dtype(of: Scene, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """A product in one dtype, added in that of the model."""

    def merge(name: str, weight: Tensor) -> Tensor:
        down, up = (factor.to(dtype) for factor in of.factors[name])
        return weight + ((up @ down) * (ALPHA / RANK)).to(weight.dtype)

    return merge


def test_a_float64_model_is_proven_where_its_update_was_computed_in_float64(double: Scene, tmp_path: Path) -> None:
    """By any order of the sums; and where elements cancel, as where the update takes all of a row away but rounding."""
    assert_proven(verified(double, double.merged(in_dtype(double, torch.float64)), tmp_path))
    back = loratool.verify(double.base, tmp_path / "merged", double.adapter, weights=-1, device="cpu")
    assert back.exit_code == 0, str(back)


def test_a_float64_model_whose_update_was_computed_in_float32_is_not_proven(double: Scene, tmp_path: Path) -> None:
    """The distance is that of the model's dtype, and what float32 takes from the update is named as the cause."""
    tensors = double.merged(in_dtype(double, torch.float32))
    found = verified(double, tensors, tmp_path)
    assert (found.verdict, found.exit_code, codes(found)) == ("not-proven", 5, ["computed-in-float32"]), str(found)
    assert found.tensors is not None
    for name in double.factors:
        ours, theirs = double.weights[name] + double.change(name), tensors[name]
        size = torch.stack([each.abs() for each in (ours, double.weights[name], double.change(name))]).amax(0)
        ulp = float(((theirs - ours).abs() / (torch.nextafter(size, size * 2) - size)).max())
        assert found.tensors[name].ulp == pytest.approx(ulp, rel=1e-3)
    tensors[next(iter(double.factors))][3, 5] += 1e-5
    found = loratool.verify(double.write(tensors, tmp_path / "odd"), double.base, double.adapter, device="cpu")
    assert found.exit_code == 5
    assert set(codes(found)) > {"computed-in-float32"}


@pytest.mark.parametrize("tool", [unsloth, mergekit])
@pytest.mark.parametrize("of", ["small", "single"])
def test_the_arithmetic_of_other_tools_is_proven(
    tool: Callable[[Scene], Callable[[str, Tensor], Tensor]], of: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here: Scene = request.getfixturevalue(of)
    found = verified(here, here.merged(tool(here)), tmp_path)
    assert found.exit_code == 0, str(found)
    assert found.verdict == "proven" or tool is mergekit


def peft_merge(of: Scene, out: Path, dtype: torch.dtype, **settings: Any) -> Path:
    """What PEFT's `merge_and_unload` gives, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(of.base, dtype=dtype)
    peft.PeftModel.from_pretrained(model, of.adapter, **settings).merge_and_unload().save_pretrained(out)
    return out


@pytest.mark.parametrize("of", ["small", "single"])
def test_a_merge_by_peft_is_proven_with_a_note_on_the_config(
    of: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Factors are in float32 there, so that weights are rounded once; transformers adds keys to the config."""
    here: Scene = request.getfixturevalue(of)
    out = peft_merge(here, tmp_path / "merged", here.weights[NORM].dtype)
    found = loratool.verify(out, here.base, here.adapter, device="cpu")
    assert_proven(found)
    assert "config-keys-differ" in [note.code for note in found.notes]


def test_a_weight_that_was_not_passed_is_proposed(small: Scene, tmp_path: Path) -> None:
    """Every module contains the same part of its update, which no mistake is known to give."""
    loratool.merge(small.base, small.adapter, tmp_path / "merged", weights=0.8, device="cpu")
    (found,) = loratool.verify(tmp_path / "merged", small.base, small.adapter, device="cpu").diagnoses
    assert found.text.endswith("if it was merged with a weight of 0.8, pass that with -w")
    (found,) = loratool.verify(tmp_path / "merged", small.base, small.adapter, weights=0.55, device="cpu").diagnoses
    assert found.text.endswith("if it was merged with a weight of 0.8, pass that with -w")


def test_a_merge_by_peft_with_bf16_factors_is_rounded_twice(tmp_path: Path) -> None:
    """The factors are stored in bfloat16, so nothing but the order of roundings differs from the formula."""
    here = scene(tmp_path / "scene", size=1.0, factors=torch.bfloat16)
    out = peft_merge(here, tmp_path / "merged", torch.bfloat16, autocast_adapter_dtype=False)
    found = loratool.verify(out, here.base, here.adapter, device="cpu")
    assert (found.exit_code, found.rounding, codes(found)) == (0, "twice", ["rounded-twice"]), str(found)
    assert {*found.diagnoses[0].modules} == {module(name) for name in here.factors}
    exact = loratool.verify(out, here.base, here.adapter, device="cpu", rounding="twice")
    assert (exact.exit_code, exact.rounding) == (0, "twice")


def test_an_element_2_ulp_off_passes_only_where_the_update_was_rounded_first(small: Scene, tmp_path: Path) -> None:
    name = min(small.factors)
    tensors = small.merged(lambda name, weight: weight + small.change(name).to(weight.dtype))
    once = small.merged()[name]
    apart = tensors[name].view(torch.int16) - once.view(torch.int16)
    row, column = torch.nonzero((apart == 1) & (tensors[name].abs() > 0.03))[0].tolist()
    tensors[name].view(torch.int16)[row, column] += 1
    found = verified(small, tensors, tmp_path)
    assert (found.verdict, found.exit_code, codes(found)) == ("rounded-twice", 0, ["rounded-twice"]), str(found)
    assert found.tensors is not None
    assert (found.tensors[name].status, found.tensors[name].ulp) == ("rounded-twice", 2.0)
    assert verified(small, tensors, tmp_path, rounding="nearest").exit_code == 5
    exact = {**small.merged(), name: once.clone()}
    exact[name].view(torch.int16)[row, column] += 2
    assert only(verified(small, exact, tmp_path)).code == "elements-differ"


def test_two_adapters_with_weights_are_proven_together_and_each_has_its_factor(small: Scene, tmp_path: Path) -> None:
    other = scene(tmp_path / "other", size=0.1, seed=1, lora_alpha=2 * ALPHA)

    def both(name: str, weight: Tensor, first: float = 0.5) -> Tensor:
        return rounded(
            weight.double() + first * small.change(name) - 2 * other.change(name, 2 * ALPHA / RANK), weight.dtype
        )

    out = small.write(small.merged(both), tmp_path / "merged")
    names = [small.adapter, other.adapter]
    assert_proven(loratool.verify(out, small.base, names, weights=[0.5, -2], device="cpu"))
    out = small.write(small.merged(lambda name, weight: both(name, weight, 1.0)), tmp_path / "merged")
    wrong = only(loratool.verify(out, small.base, names, weights=[0.5, -2], device="cpu"))
    assert wrong.code == "factor"
    assert {"weight-ignored", "merged-twice"} == {*wrong.numbers["causes"]}


@pytest.mark.parametrize(("own", "weight"), [(False, 2.0**-40), (True, 0.5), (True, 1.0)])
def test_an_update_that_the_rows_do_not_tell_from_another_one_is_not_missed(
    own: bool, weight: float, small: Scene, tmp_path: Path
) -> None:
    """One far smaller than the other, or the same one again; an element is off by 1 ulp, so that rows are looked at."""
    other = small if own else scene(tmp_path / "other", seed=1)
    out = small.merged(lambda name, w: rounded(w.double() + small.change(name) + weight * other.change(name), w.dtype))
    name = min(small.factors)
    out[name].view(torch.int16)[1, 2] += 1
    names = [small.adapter, other.adapter]
    found = loratool.verify(small.write(out, tmp_path / "merged"), small.base, names, weights=[1, weight], device="cpu")
    assert_proven(found)
    assert found.tensors is not None
    assert (found.tensors[name].status, found.tensors[name].ulp) == ("proven", 1)


# ---------------------------------------------------------------- one fault at a time

SCALE = ALPHA / RANK
FACTORS = {
    "merged-twice": 2.0,
    "wrong-sign": -1.0,
    "lora-read-as-rslora": RANK**0.5,
    "rank-forgotten": float(RANK),
    "divided-by-rank": 1 / RANK,
    "multiplied-by-alpha": ALPHA,
    "alpha-forgotten": 1 / ALPHA,
    "scaling-forgotten": 1 / SCALE,
    "scaled-twice": SCALE,
}


@pytest.mark.parametrize(
    ("of", "cause"),
    [*(("small", cause) for cause in FACTORS), ("faint", "merged-twice"), ("faint", "alpha-forgotten")],
)
def test_a_factor_is_told_with_the_cause_that_gives_it(
    of: str, cause: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here: Scene = request.getfixturevalue(of)
    factor = FACTORS[cause]
    found = verified(
        here, here.merged(lambda name, w: rounded(w.double() + factor * here.change(name), w.dtype)), tmp_path
    )
    told = only(found)
    assert (told.code, told.numbers["causes"]) == ("factor", [cause])
    assert told.numbers["factor"] == pytest.approx(factor, rel=0.01)
    assert {*told.modules} == {module(name) for name in here.factors}


def test_rslora_that_was_read_as_lora_is_told(tmp_path: Path) -> None:
    here = scene(tmp_path / "scene", use_rslora=True)
    told = only(verified(here, here.merged(), tmp_path))  # scaled by α/r
    assert (told.code, told.numbers["causes"]) == ("factor", ["rslora-read-as-lora"])


def test_a_weight_that_was_applied_twice_is_told(small: Scene, tmp_path: Path) -> None:
    tensors = small.merged(lambda name, w: rounded(w.double() + 0.7**2 * small.change(name), w.dtype))
    told = only(verified(small, tensors, tmp_path, weights=[0.7]))
    assert (told.code, told.numbers["causes"]) == ("factor", ["weight-squared"])


def test_a_factor_without_a_known_cause_is_told_as_a_number(small: Scene, tmp_path: Path) -> None:
    tensors = small.merged(lambda name, w: rounded(w.double() + 1.37 * small.change(name), w.dtype))
    told = only(verified(small, tensors, tmp_path))
    assert (told.code, told.numbers["causes"]) == ("factor", [])
    assert "1.37" in told.text


def test_a_base_that_nothing_was_merged_into_is_told(small: Scene, tmp_path: Path) -> None:
    told = only(verified(small, small.weights, tmp_path))
    assert told.code == "not-merged"
    assert {*told.modules} == {module(name) for name in small.factors}


def test_an_update_that_rounding_takes_away_may_be_missing(tmp_path: Path) -> None:
    here = scene(tmp_path / "scene", size=1e-7)
    assert all(torch.equal(here.merged()[name], here.weights[name]) for name in here.factors)
    assert_proven(verified(here, here.weights, tmp_path))


Fault = Callable[[Scene, Tensors, random.Random], set[str]]


def random_like(weight: Tensor, size: float, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if not rank:
        return torch.randn(weight.shape, generator=generator, dtype=torch.float64) * size
    up, down = (
        torch.randn(weight.shape[0], rank, generator=generator),
        torch.randn(rank, weight.shape[1], generator=generator),
    )
    return (up.double() @ down.double()) * size


def edited(of: Scene, pick: random.Random, part: str = "") -> str:
    return pick.choice([name for name in of.factors if part in name])


def untouched(of: Scene, pick: random.Random, part: str) -> str:
    return pick.choice([name for name in of.weights if name not in of.factors and part in name])


def left_out(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    names = {edited(of, pick), edited(of, pick)}
    tensors.update({name: of.weights[name].clone() for name in names})
    return names


def twice_in_one(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = edited(of, pick)
    tensors[name] = rounded(of.weights[name].double() + 2 * of.change(name), tensors[name].dtype)
    return {name}


def merged_besides(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = untouched(of, pick, "_proj")
    weight = of.weights[name]
    tensors[name] = rounded(weight.double() + random_like(weight, 0.005, RANK), weight.dtype)
    return {name}


def transposed(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = edited(of, pick, "q_proj")
    tensors[name] = rounded(of.weights[name].double() + of.change(name).T, tensors[name].dtype)
    return {name}


def another_base(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    for name, weight in of.weights.items():
        own = weight.double() + random_like(weight, 0.05) * weight.double().abs().mean()
        tensors[name] = rounded(own + of.change(name) if name in of.factors else own, weight.dtype)
        if name not in of.factors:
            continue
        tensors[name] = rounded(rounded(own, weight.dtype).double() + of.change(name), weight.dtype)
    return {*of.weights}


def another_norm(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    names = {untouched(of, pick, "norm"), untouched(of, pick, "k_proj")}
    tensors.update({name: rounded(of.weights[name].double() * 1.05, of.weights[name].dtype) for name in names})
    return names


def resized(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(8, HIDDEN, dtype=tensors[EMBEDDING].dtype)])
    return {EMBEDDING}


def untied(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    tensors[HEAD] = tensors[EMBEDDING] * 2
    return {HEAD}


def other_dtype(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    for name in of.factors:
        tensors[name] = (of.weights[name].double() + of.change(name)).float()
    return {*of.factors}


def flipped(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = edited(of, pick)
    tensors[name].view(torch.int16)[pick.randrange(len(tensors[name])), 3] ^= 1 << pick.randrange(4, 9)
    return {name}


def flipped_elsewhere(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = untouched(of, pick, "_proj")
    tensors[name].view(torch.int16)[pick.randrange(len(tensors[name])), 3] ^= 1
    return {name}


def missing(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = untouched(of, pick, "_proj")
    del tensors[name]
    return {name}


def unknown(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    tensors["model.extra.weight"] = tensors[NORM].clone()
    return {"model.extra.weight"}


def other_shape(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = pick.choice([edited(of, pick, "down_proj"), untouched(of, pick, "k_proj")])
    tensors[name] = tensors[name].reshape(-1, HIDDEN // 2)
    return {name}


def damaged(of: Scene, tensors: Tensors, pick: random.Random) -> set[str]:
    name = edited(of, pick)
    tensors[name] = rounded(tensors[name].double() + random_like(tensors[name], 0.02), tensors[name].dtype)
    return {name}


FAULTS: Mapping[str, tuple[str, Fault, Mapping[str, Any]]] = {
    "a module left out": ("left-out", left_out, {}),
    "one module twice": ("factor", twice_in_one, {}),
    "another module merged": ("merged-besides", merged_besides, {}),
    "transposed": ("transposed", transposed, {}),
    "another base": ("another-base", another_base, {}),
    "other untouched tensors": ("another-base", another_norm, {}),
    "embeddings resized": ("embeddings-resized", resized, {"vocab_size": TOKENS + 8}),
    "tied weight untied": ("tied-weight-untied", untied, {"tie_word_embeddings": False}),
    "dtype changed": ("dtype-changed", other_dtype, {"torch_dtype": "float32"}),
    "a bit flipped": ("elements-differ", flipped, {}),
    "a bit flipped where nothing is merged": ("elements-differ", flipped_elsewhere, {}),
    "a tensor of another shape": ("shape-differs", other_shape, {}),
    "noise in an edited tensor": ("unexplained", damaged, {}),
    "a tensor missing": ("missing-tensors", missing, {}),
    "a tensor too many": ("unknown-tensors", unknown, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_its_modules_and_nothing_else_is_named(
    fault: str, small: Scene, tmp_path: Path
) -> None:
    code, plant, config = FAULTS[fault]
    tensors = small.merged()
    names = plant(small, tensors, random.Random(fault))
    told = only(verified(small, tensors, tmp_path, config))
    assert told.code == code, told
    assert {module(name) for name in told.modules} == {module(name) for name in names}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("another module merged", "noise in an edited tensor"),
        ("another module merged", "other untouched tensors"),
        ("a bit flipped where nothing is merged", "a module left out"),
    ],
)
def test_two_faults_are_told_apart(first: str, second: str, pick: random.Random, small: Scene, tmp_path: Path) -> None:
    """Neither is taken for another base, of which most tensors would differ."""
    tensors, wanted = small.merged(), {}
    for fault in (first, second):
        code, plant, _ = FAULTS[fault]
        wanted[code] = {module(name) for name in plant(small, tensors, pick)}
    found = verified(small, tensors, tmp_path)
    assert {each.code: {*each.modules} for each in found.diagnoses} == wanted, str(found)


@pytest.mark.parametrize("fault", ["a module left out", "another module merged", "transposed", "another base"])
def test_a_fault_is_found_where_updates_are_smaller_than_a_step(fault: str, faint: Scene, tmp_path: Path) -> None:
    code, plant, config = FAULTS[fault]
    tensors = faint.merged()
    plant(faint, tensors, random.Random(3))
    assert only(verified(faint, tensors, tmp_path, config)).code == code


def test_factors_that_were_rounded_first_are_told(small: Scene, tmp_path: Path) -> None:
    """Those on disk are in float32; in bfloat16 their product is another one."""

    def coarse(name: str, weight: Tensor) -> Tensor:
        down, up = (factor.bfloat16() for factor in small.factors[name])
        return weight + (up @ down) * SCALE

    assert only(verified(small, small.merged(coarse), tmp_path)).code == "factors-rounded"


def test_a_head_with_the_values_that_it_is_tied_to_is_only_noted(small: Scene, tmp_path: Path) -> None:
    tensors = small.merged()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    found = verified(small, tensors, tmp_path)
    assert (found.exit_code, codes(found)) == (0, ["tied-weight-untied"])


def test_a_head_that_still_changes_with_the_embedding_is_told(tmp_path: Path) -> None:
    """In PEFT, an update of the embedding changes no logits by way of the head, so the head must be stored."""
    plain, generator = scene(tmp_path / "scene"), torch.Generator().manual_seed(1)
    down, up = torch.randn(RANK, TOKENS, generator=generator), torch.randn(HIDDEN, RANK, generator=generator) * 0.1
    adapter, module_name = tmp_path / "adapter", "base_model.model.model.embed_tokens"
    write_adapter(adapter, {}, target_modules=["embed_tokens"])
    save_file(
        {f"{module_name}.lora_embedding_A": down, f"{module_name}.lora_embedding_B": up},
        adapter / "adapter_model.safetensors",
    )
    changed = plain.weights[EMBEDDING].double() + (up.double() @ down.double()).T * SCALE
    tensors = {**plain.weights, EMBEDDING: rounded(changed, torch.bfloat16)}
    told = only(loratool.verify(plain.write(tensors, tmp_path / "tied"), plain.base, adapter, device="cpu"))
    assert (told.code, told.modules) == ("still-tied", (HEAD,))
    tensors[HEAD] = plain.weights[EMBEDDING].clone()
    out = plain.write(tensors, tmp_path / "untied", {"tie_word_embeddings": False})
    assert_proven(loratool.verify(out, plain.base, adapter, device="cpu"))


def test_a_head_that_is_left_out_because_it_is_tied_is_noted(small: Scene, tmp_path: Path) -> None:
    stored = {**small.weights, HEAD: small.weights[EMBEDDING].clone()}
    base = small.write(stored, tmp_path / "base")
    found = loratool.verify(small.write(small.merged(), tmp_path / "merged"), base, small.adapter, device="cpu")
    assert_proven(found)
    assert [note.code for note in found.notes] == ["tied-weight-left-out"]


def test_buffers_that_one_side_has_are_noted(small: Scene, tmp_path: Path) -> None:
    tensors = {**small.merged(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    found = verified(small, tensors, tmp_path)
    assert_proven(found)
    assert [note.code for note in found.notes] == ["buffers-differ"]


def test_side_files_with_other_bytes_are_noted(small: Scene, tmp_path: Path) -> None:
    base = small.write(small.weights, tmp_path / "base")
    for name in ("tokenizer.json", "merges.txt"):
        (base / name).write_text("{}")
    out = small.write(small.merged(), tmp_path / "merged")
    (out / "tokenizer.json").write_text("{ }")
    found = loratool.verify(out, base, small.adapter, device="cpu")
    assert_proven(found)
    (note,) = found.notes
    assert (note.code, note.text) == (
        "side-files-differ",
        "other bytes than those of the inputs: merges.txt (missing), tokenizer.json",
    )


def test_of_very_many_tensors_that_differ_some_are_looked_at_and_a_note_says_how_many_are_not(
    small: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.verifying.verifier.MOST_LOOKED_AT", 3)
    tensors = small.merged(lambda name, w: rounded(w.double() + 2 * small.change(name), w.dtype))
    found = verified(small, tensors, tmp_path)
    assert only(found).numbers["causes"] == ["merged-twice"]
    (note,) = found.notes
    assert note.code == "looked-at-some"
    assert f"{len(small.factors)} edited tensors, {len(small.factors) - 3} that differ" in note.text


def test_a_dtype_that_was_asked_for_is_no_fault(small: Scene, tmp_path: Path) -> None:
    tensors = {name: weight.float() for name, weight in small.weights.items()}
    tensors |= {name: (small.weights[name].double() + small.change(name)).float() for name in small.factors}
    asked = {"torch_dtype": "float32"}
    assert_proven(verified(small, tensors, tmp_path, asked, dtype="float32"))
    assert only(verified(small, tensors, tmp_path, asked)).code == "dtype-changed"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"rope_theta": 500.0}, "config-changed"),
        ({"rms_norm_eps": 1e-6, "transformers_version": "5.0"}, None),
        ({"torch_dtype": None, "dtype": "bfloat16"}, None),
    ],
)
def test_a_changed_key_of_the_config_is_a_fault_and_an_added_one_is_not(
    config: Mapping[str, Any], code: str | None, small: Scene, tmp_path: Path
) -> None:
    found = verified(small, small.merged(), tmp_path, config)
    assert (found.exit_code, codes(found)) == ((5, [code]) if code else (0, []))


def test_a_model_without_its_config_is_told(small: Scene, tmp_path: Path) -> None:
    out = small.write(small.merged(), tmp_path / "merged")
    (out / "config.json").unlink()
    assert only(loratool.verify(out, small.base, small.adapter, device="cpu")).code == "config-missing"


# ---------------------------------------------------------------- wrong inputs


def test_another_adapter_of_the_same_shapes_ends_in_one_sentence(small: Scene, tmp_path: Path) -> None:
    tensors = small.merged(lambda name, w: rounded(w.double() + random_like(w, 0.005, RANK), w.dtype))
    with pytest.raises(FitError, match="was not made with adapter") as caught:
        verified(small, tensors, tmp_path)
    assert "\n" not in str(caught.value)


def test_another_adapter_with_more_modules_ends_in_one_sentence(small: Scene, tmp_path: Path) -> None:
    tensors = {**small.weights}
    for name in [*small.factors, *(name for name in small.weights if "k_proj" in name)]:
        weight = small.weights[name]
        tensors[name] = rounded(weight.double() + random_like(weight, 0.005, RANK), weight.dtype)
    with pytest.raises(FitError, match="was not made with"):
        verified(small, tensors, tmp_path)


def test_an_adapter_of_another_model_ends_in_one_sentence(small: Scene, tmp_path: Path, capsys: Any) -> None:
    factors = {name.replace("layers", "blocks"): (down[:, :7], up[:9]) for name, (down, up) in small.factors.items()}
    other = write_adapter(tmp_path / "other", factors)
    out = small.write(small.merged(), tmp_path / "merged")
    assert cli.run(["verify", str(out), "--base", str(small.base), "--adapter", str(other), "--device", "cpu"]) == 4
    told, hint = capsys.readouterr().err.splitlines()
    assert told.startswith("Error: ")
    assert "does not fit" in told
    assert hint.startswith("hint: ")


def test_a_merged_model_of_another_kind_ends_in_one_sentence(small: Scene, tmp_path: Path) -> None:
    tensors = {f"encoder.{number}.weight": weight for number, weight in enumerate(small.weights.values())}
    with pytest.raises(FitError, match="is not a model made from base"):
        verified(small, tensors, tmp_path)


def test_options_of_a_merge_need_an_adapter(small: Scene) -> None:
    with pytest.raises(UsageError, match="needs --adapter"):
        loratool.verify(small.base, small.base)
    with pytest.raises(UsageError, match="--weight: needs --adapter"):
        loratool.verify(small.base, weights=[2])


def test_the_command_line_prints_the_same_data_and_ends_with_its_code(
    small: Scene, tmp_path: Path, capsys: Any
) -> None:
    out = small.write(small.weights, tmp_path / "merged")
    words = ["verify", str(out), "--base", str(small.base), "--adapter", str(small.adapter), "--device", "cpu"]
    assert cli.run([*words, "--json"]) == 5
    table = json.loads(capsys.readouterr().out)
    assert (table["schema"], table["verdict"], table["passes"]) == (1, "not-proven", False)
    name = next(iter(small.factors))
    assert table["tensors"][name]["status"] == "different"
    assert table["tensors"][name]["factor"] == [0.0]
    assert {"ulp", "equal"} <= {*table["tensors"][name]}
    assert table["diagnoses"][0]["code"] == "not-merged"
    assert cli.run(words) == 5
    assert "not merged into any of its 12 modules" in capsys.readouterr().out
