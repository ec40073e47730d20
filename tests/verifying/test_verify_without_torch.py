"""Weights of bfloat16 are compared without torch where that suffices, and nothing is missed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merged_models import CONFIG, Scene, Tensors, rounded, scene, write_adapter, write_model
from safetensors.torch import load_file

import loratool

LAYER = "model.layers.0."
ODD, EVEN, TIES = (f"{LAYER}{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj"))
NEAR_TIE = 17  # the column of `TIES` whose sums lie next to the middle between two numbers
CHECK = """
import sys, loratool
found = loratool.verify(*sys.argv[1:])
assert found.exit_code == 0, str(found)
print(found.verdict, "torch" in sys.modules)
"""
# What numpy needs nothing of where all is as it should be: each takes time at every start.
NEEDLESS = {
    *("adapters.formats.gguf", "adapters.layers", "adapters.writer", "files.digests", "files.journal", "files.staging"),
    *("measuring.delta_statistics", "merging.engine", "merging.exact_rows", "merging.loaded_edits", "merging.merge"),
    *("merging.row_blocks", "merging.tasks", "provenance.record", "results.merge", "verifying.records"),
}
# The command, which reads no folder of a merge as something else that was meant.
BY_COMMAND = """
import sys
from loratool.cli import run
assert run(["verify", sys.argv[1], "-q"]) == 0
print({"loratool.fetching", "loratool.adapters.formats"}.isdisjoint(sys.modules))
"""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Weights of an odd width, of more than one tile, and with sums that float32 takes for ties."""
    home, generator = tmp_path_factory.mktemp("scene"), torch.Generator().manual_seed(3)
    weights: Tensors = {
        ODD: (torch.randn(70, 37, generator=generator) * 0.05).bfloat16(),
        EVEN: (torch.randn(1300, 130, generator=generator) * 0.05).bfloat16(),
        TIES: (1 + torch.rand(64, 128, generator=generator) / 2).bfloat16(),  # with a step of 2^-7
        "model.norm.weight": torch.ones(48).bfloat16(),
    }
    factors = {}
    for name in (ODD, EVEN):
        rows, width = weights[name].shape
        factors[name] = torch.randn(4, width, generator=generator), torch.randn(rows, 4, generator=generator) * 0.005
    down, up = torch.zeros(4, 128), torch.zeros(64, 4)
    down[0, NEAR_TIE], down[1, NEAR_TIE] = 2.0**-8, 2.0**-14
    up[:, 0], up[:, 1] = 1, torch.tensor([2.0**-14, -(2.0**-14)]).repeat(32)  # 2^-28: less than float32 keeps
    factors[TIES] = down, up
    write_model(home / "base", weights, CONFIG)
    settings = {"r": 4, "lora_alpha": 4.0, "target_modules": ["q_proj", "up_proj", "v_proj"]}
    write_adapter(home / "adapter", factors, request.param, **settings)
    stored = load_file(home / "adapter" / "adapter_model.safetensors")
    exact = {}
    for name in factors:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        exact[name] = stored[f"{module}.lora_A.weight"].double(), stored[f"{module}.lora_B.weight"].double()
    return Scene(home, weights, exact)


def sums(of: Scene) -> Tensors:
    """Each W + ΔW in float64, rounded once."""
    return of.merged(lambda name, weight: rounded(weight.double() + of.change(name, 1.0), weight.dtype))


def run(code: str, *words: Path) -> list[str]:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_sound_model_is_proven_and_torch_is_not_imported(of: Scene, tmp_path: Path) -> None:
    """Sums next to a tie are decided by exact values, up as well as down."""
    tensors = sums(of)
    steps = tensors[TIES][:, NEAR_TIE].float() - of.weights[TIES][:, NEAR_TIE].float()
    assert set(steps.tolist()) == {0.0, 2.0**-7}
    done = run(f"{CHECK}print(*sys.modules)", of.write(tensors, tmp_path / "merged"), of.base, of.adapter)
    assert done[:2] == ["proven", "False"]
    assert "loratool.verifying.quick_numpy" in done
    assert [each for each in done if each.removeprefix("loratool.") in NEEDLESS] == []


def test_a_record_is_checked_without_torch_and_numpy(tmp_path: Path) -> None:
    of = scene(tmp_path)
    loratool.merge(of.base, of.adapter, tmp_path / "merged", device="cpu")
    check = CHECK.replace('"torch" in sys.modules', '{"torch", "numpy"}.isdisjoint(sys.modules)')
    done = run(f"{BY_COMMAND}{check}", tmp_path / "merged")
    assert done == ["True", "as-recorded", "True"]


@pytest.mark.parametrize(
    ("name", "place"),
    [(ODD, (69, 36)), (EVEN, (0, 129)), (EVEN, (611, 64)), (TIES, (40, NEAR_TIE))],
)
def test_one_element_that_is_the_next_number_is_counted(
    name: str, place: tuple[int, int], of: Scene, tmp_path: Path
) -> None:
    tensors = sums(of)
    bits = tensors[name].view(torch.int16)
    bits[place] = bits[place] + (1 if name != TIES else -1)
    found = loratool.verify(of.write(tensors, tmp_path / "merged"), of.base, of.adapter, device="cpu")
    assert (found.verdict, found.diagnoses) == ("proven", ()), str(found)
    assert found.tensors is not None
    assert {n: proof.equal for n, proof in found.tensors.items() if proof.equal != 1} == {
        name: pytest.approx(1 - 1 / tensors[name].numel(), abs=1e-9)
    }
    assert found.tensors[name].ulp == pytest.approx(1, abs=1e-3)


def test_not_a_number_and_infinity_are_told_from_numbers(of: Scene, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        tensors = sums(of)
        tensors[EVEN][5, 7] = value
        found = loratool.verify(of.write(tensors, tmp_path / "merged"), of.base, of.adapter, device="cpu")
        assert found.exit_code == 5
        assert found.tensors is not None
        assert [n for n, proof in found.tensors.items() if proof.status == "different"] == [EVEN]


def test_an_infinite_weight_of_the_base_that_is_finite_in_the_model_is_found(of: Scene, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in of.weights.items()}
    weights[EVEN][5, 7] = float("inf")
    write_model(tmp_path / "base", weights, CONFIG)
    merged = of.write(sums(of), tmp_path / "merged")
    found = loratool.verify(merged, tmp_path / "base", of.adapter, device="cpu")
    assert found.exit_code == 5
    assert found.tensors is not None
    assert [name for name, proof in found.tensors.items() if proof.status == "different"] == [EVEN]


def test_an_element_that_is_the_next_number_is_counted_wherever_it_lies_in_a_word(tmp_path: Path) -> None:
    """Elements are computed in pairs and compared four at a time; widths leave all numbers of them over."""
    generator = torch.Generator().manual_seed(11)
    weights: Tensors = {"model.norm.weight": torch.ones(48).bfloat16()}
    factors = {}
    for number, width in enumerate((1, 2, 3, 4, 5, 6, 7, 8, 1026)):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        weights[name] = (torch.randn(260, width, generator=generator) * 0.05).bfloat16()
        factors[name] = torch.randn(3, width, generator=generator), torch.randn(260, 3, generator=generator) * 0.01
    write_model(tmp_path / "base", weights, CONFIG)
    write_adapter(tmp_path / "adapter", factors, torch.float32, r=3, lora_alpha=3.0, target_modules=["up_proj"])
    of = Scene(tmp_path, weights, {name: (a.double(), b.double()) for name, (a, b) in factors.items()})
    tensors = sums(of)
    for number, name in enumerate(factors):
        bits = tensors[name].view(torch.int16)
        bits[number * 30 + number % 2, bits.shape[1] * number // 9] += 1
    found = loratool.verify(of.write(tensors, tmp_path / "merged"), of.base, of.adapter, device="cpu")
    assert found.tensors is not None
    counted = {name: (1 - (found.tensors[name].equal or 0)) * tensors[name].numel() for name in factors}
    assert counted == pytest.approx(dict.fromkeys(factors, 1), abs=0.01)
