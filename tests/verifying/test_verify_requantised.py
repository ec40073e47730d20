"""What is wrong with a merged model whose weights are quantised: one fault at a time, found by its cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import save_model
from merged_models import ALPHA, CONFIG, RANK, Scene, Tensors, codes, rounded, scene
from packed_bnb import nf4
from quantised_models import Quantised, awq, ct_int8, ct_mxfp4, ct_packed, fp8, gptq
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

Maker = Callable[[Mapping[str, Tensor]], Quantised]
MAKERS: dict[str, Maker] = {
    "nf4": nf4,
    "GPTQ": partial(gptq, bits=4, group=16),
    "AWQ": partial(awq, group=16),
    "FP8": partial(fp8, block=(16, 16)),
    "int4 groups": partial(ct_packed, bits=4, group=16, dtype="float32"),
    "int8": ct_int8,
}
QUERY, UP, OTHER = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"))


@dataclass(frozen=True)
class Bench:
    """A scene, what packs its projections, and a base that is packed, or not."""

    plain: Scene
    make: Maker
    own: Quantised | None  # of the base
    home: Path

    @property
    def weights(self) -> Tensors:
        """What the base's values are, by an independent decoder."""
        return {**self.plain.weights, **(self.own.values if self.own else {})}

    @property
    def base(self) -> Path:
        return self.home / "base" if self.own else self.plain.base

    def merged(self, factor: float = 1.0) -> Tensors:
        """W + factor · ΔW of all projections, in float64, before any rounding."""
        tensors = {name: weight.double() for name, weight in self.weights.items() if "_proj" in name}
        return tensors | {name: tensors[name] + factor * self.plain.change(name) for name in self.plain.factors}

    def packed(self, values: Tensors, folder: Path) -> Path:
        """A model of these; what is the base's own keeps the base's tensors, where it is packed."""
        made = self.make({name: value.float() for name, value in values.items()})
        if self.own is not None:
            same = [name for name in values if torch.equal(values[name], self.weights[name].double())]
            for tensor in self.own.tensors:
                if tensor in same or any(tensor.startswith(name.removesuffix("weight")) for name in same):
                    made.tensors[tensor] = self.own.tensors[tensor]
        return written(folder, made, self.plain.weights)

    def verified(self, values: Tensors, folder: Path) -> loratool.Verification:
        return loratool.verify(self.packed(values, folder), self.base, self.plain.adapter, device="cpu")


def written(folder: Path, made: Quantised, weights: Tensors) -> Path:
    others = {name: weight for name, weight in weights.items() if name not in made.values}
    return save_model(folder, {**others, **made.tensors}, {**CONFIG, "quantization_config": made.config})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("plain"), size=0.5)


def bench(kind: str, packed: bool, plain: Scene, home: Path) -> Bench:
    own = MAKERS[kind]({name: value for name, value in plain.weights.items() if "_proj" in name}) if packed else None
    if own is not None:
        written(home / "base", own, plain.weights)
    return Bench(plain, MAKERS[kind], own, home)


@pytest.fixture(scope="module", params=MAKERS)
def anew(request: pytest.FixtureRequest, plain: Scene, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base that is packed itself."""
    return bench(request.param, True, plain, tmp_path_factory.mktemp("anew"))


@pytest.fixture(scope="module", params=["nf4", "GPTQ", "int8"])
def quantised(request: pytest.FixtureRequest, plain: Scene, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base in 16 bits, of which the merged model was quantised afterwards."""
    return bench(request.param, False, plain, tmp_path_factory.mktemp("quantised"))


Fault = Callable[[Bench, Tensors], set[str]]


def all_times(factor: float, of: Bench, tensors: Tensors) -> set[str]:
    tensors.update(of.merged(factor))
    return {*of.plain.factors}


def one_times(factor: float, of: Bench, tensors: Tensors) -> set[str]:
    tensors[UP] = of.weights[UP].double() + factor * of.plain.change(UP)
    return {UP}


def transposed(of: Bench, tensors: Tensors) -> set[str]:
    tensors[QUERY] = of.weights[QUERY].double() + of.plain.change(QUERY).T
    return {QUERY}


def merged_besides(of: Bench, tensors: Tensors) -> set[str]:
    tensors[OTHER] = tensors[OTHER] + of.plain.change(UP)
    return {OTHER}


def another_base(of: Bench, tensors: Tensors) -> set[str]:
    numbers = torch.Generator().manual_seed(6)
    for name, values in tensors.items():
        tensors[name] = values + torch.randn(values.shape, generator=numbers) * 0.02
    return {*tensors}


FAULTS: dict[str, tuple[str, Fault]] = {
    "twice": ("merged-twice", partial(all_times, 2.0)),
    "subtracted": ("wrong-sign", partial(all_times, -1.0)),
    "α forgotten": ("alpha-forgotten", partial(all_times, 1 / ALPHA)),
    "as rsLoRA": ("lora-read-as-rslora", partial(all_times, RANK**0.5)),
    "nothing merged": ("not-merged", partial(all_times, 0.0)),
    "one left out": ("left-out", partial(one_times, 0.0)),
    "one twice": ("merged-twice", partial(one_times, 2.0)),
    "transposed": ("transposed", transposed),
    "another module": ("merged-besides", merged_besides),
    "another base": ("another-base", another_base),
}


def assert_found(found: loratool.Verification, cause: str, names: set[str]) -> None:
    """One cause is named, of these modules, and nothing else."""
    (told,) = (each for each in found.diagnoses if not each.passes)
    assert found.exit_code == 5
    assert cause in ([*told.numbers["causes"]] if told.code == "factor" else [told.code]), str(found)
    assert {*told.modules} == {name.removesuffix(".weight") for name in names}, str(found)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_requantised_model_is_found_by_its_cause(fault: str, anew: Bench, tmp_path: Path) -> None:
    cause, plant = FAULTS[fault]
    tensors = anew.merged()
    names = plant(anew, tensors)
    assert_found(anew.verified(tensors, tmp_path / "merged"), cause, names)


@pytest.mark.parametrize("fault", ["α forgotten", "one left out", "transposed", "another module", "another base"])
def test_a_fault_in_a_model_that_was_quantised_after_the_merge_is_found(
    fault: str, quantised: Bench, tmp_path: Path
) -> None:
    cause, plant = FAULTS[fault]
    tensors = quantised.merged()
    names = plant(quantised, tensors)
    assert_found(quantised.verified(tensors, tmp_path / "merged"), cause, names)


def test_factors_that_make_the_same_values_are_all_told(tmp_path: Path) -> None:
    """ΔW / 15 is a fiftieth of a step of nf4: it changes no more of the base's own values than nothing at all does."""
    of = bench("nf4", True, scene(tmp_path / "plain", size=0.1, seed=1), tmp_path)
    found = of.verified(of.merged(1 / ALPHA), tmp_path / "merged")
    (told,) = (each for each in found.diagnoses if not each.passes)
    assert (told.code, told.numbers["causes"]) == ("not-merged", ["not-merged", "alpha-forgotten"]), str(found)
    assert told.text.endswith(", or α = 15 was left out of the scaling")


def test_the_nearest_values_to_the_formula_are_proven(anew: Bench, tmp_path: Path) -> None:
    found = anew.verified(anew.merged(), tmp_path / "merged")
    assert (found.verdict, codes(found)) == ("proven", ["quantised"]), str(found)


def test_weights_that_were_rounded_to_16_bits_before_they_were_quantised_pass_with_a_note(
    quantised: Bench, tmp_path: Path
) -> None:
    """As tools do that save the merged model first: a few elements are next to the nearest value."""
    tensors = {name: rounded(values, torch.bfloat16).double() for name, values in quantised.merged().items()}
    found = quantised.verified(tensors, tmp_path / "merged")
    assert (found.exit_code, codes(found)) == (0, ["rounded-before-packing", "quantised"]), str(found)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("", "quantised-differently"),
        ("twice", "merged-twice"),
        ("one left out", "left-out"),
        ("transposed", "transposed"),
    ],
)
def test_least_squares_find_a_fault_where_values_are_not_the_nearest_ones(
    fault: str, told: str, plain: Scene, tmp_path: Path
) -> None:
    """Packing to random neighbours adds noise like that of methods with calibration, which say nothing of ΔW."""
    of, numbers = bench("int8", False, plain, tmp_path), torch.Generator().manual_seed(8)
    tensors = of.merged()
    names = FAULTS[fault][1](of, tensors) if fault else {*tensors}
    for name, values in tensors.items():
        steps = values.abs().amax(1, keepdim=True) / 127
        tensors[name] = values + (torch.rand(values.shape, generator=numbers) - 0.5) * steps
    found = of.verified(tensors, tmp_path / "merged")
    wrong = [each for each in found.diagnoses if not each.passes]
    causes = {cause for each in wrong for cause in (*each.numbers.get("causes", ()), each.code)}
    assert told in causes, str(found)
    (of_fault,) = (each for each in wrong if told in (each.code, *each.numbers.get("causes", ())))
    if fault:
        assert {*of_fault.modules} == {name.removesuffix(".weight") for name in names}


def test_an_adapter_of_another_model_is_refused_in_one_sentence(tmp_path: Path, plain: Scene) -> None:
    of, other = bench("GPTQ", False, plain, tmp_path), scene(tmp_path / "other", size=0.5, seed=5)
    out = of.packed(of.merged(), tmp_path / "merged")
    with pytest.raises(loratool.FitError, match="was not made with"):
        loratool.verify(out, of.base, other.adapter, device="cpu")


def test_values_of_the_merged_model_are_not_taken_for_those_of_the_base(anew: Bench, tmp_path: Path) -> None:
    """Parts of a packed weight that are held in memory are one side's alone: what survived is measured between both."""
    found = anew.verified(anew.merged(), tmp_path / "merged")
    gains = found.diagnoses[-1].numbers["gains"]
    made = anew.make({name: value.float() for name, value in anew.merged().items()})
    for name in anew.plain.factors:
        change = anew.plain.change(name)
        applied = made.values[name].double() - anew.weights[name].double()
        assert gains[name] == pytest.approx(float((applied * change).sum() / change.square().sum()), abs=0.02)


def test_a_power_of_two_that_is_far_from_that_of_its_block_is_named(plain: Scene, tmp_path: Path) -> None:
    """The scales are bytes, and those of a model that was quantised after the merge are nobody else's."""
    of = Bench(plain, ct_mxfp4, None, tmp_path)
    folder = of.packed(of.merged(), tmp_path / "merged")
    assert loratool.verify(folder, of.base, plain.adapter, device="cpu").verdict == "proven"
    tensors = load_file(folder / "model.safetensors")
    tensors[UP + "_scale"].view(-1)[3] -= 16
    save_file(tensors, folder / "model.safetensors")
    assert_found(loratool.verify(folder, of.base, plain.adapter, device="cpu"), "scales-differ", {UP})


def damage(folder: Path, factor: float) -> str:
    """Multiply one scale of a weight of a model by a power of two; its tensor's name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    stem = UP.removesuffix(".weight")
    name = next(n for n, t in tensors.items() if n.startswith(stem) and re.search("scale|absmax", n) and t.numel() > 1)
    tensors[name].view(-1)[3] *= factor
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**4])
def test_a_scale_that_its_group_should_not_have_is_named(anew: Bench, factor: float, tmp_path: Path) -> None:
    """The values of that group are the nearest ones that the scale gives, or next to them, and all of them are lost."""
    anew.packed(anew.merged(), tmp_path / "merged")
    name = damage(tmp_path / "merged", factor)
    found = loratool.verify(tmp_path / "merged", anew.base, anew.plain.adapter, device="cpu")
    assert_found(found, "scales-differ", {UP})
    assert name in str(found)
