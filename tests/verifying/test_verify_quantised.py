"""Merges into quantised bases are proven like others, and quantised outputs to half a step of their format."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_model
from merged_models import CONFIG, RANK, Scene, Tensors, codes, only, rounded, scene, write_adapter
from quantised_models import Quantised, ct_packed, fp8

import loratool

CPU = "cpu"
MAKERS: dict[str, Callable[[Tensors], Quantised]] = {
    "int4 groups": lambda weights: ct_packed(weights, 4, 16, dtype="float32"),
    "FP8 blocks": lambda weights: fp8(weights, (16, 16)),
}


def projections(weights: Tensors) -> Tensors:
    return {name: weight for name, weight in weights.items() if "_proj" in name}


def written(folder: Path, made: Quantised, others: Tensors) -> Path:
    """A model of which some weights are quantised."""
    return save_model(folder, {**others, **made.tensors}, {**CONFIG, "quantization_config": made.config})


@pytest.fixture(scope="module", params=MAKERS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Quantised, Path]:
    """A scene, its base quantised, and where that is."""
    home = tmp_path_factory.mktemp("packed")
    plain = scene(home, size=0.5)
    made = MAKERS[request.param](projections(plain.weights))
    others = {name: weight for name, weight in plain.weights.items() if name not in made.values}
    return plain, made, written(home / "quantised", made, others)


Packed = tuple[Scene, Quantised, Path]


@pytest.mark.parametrize("dequantize", [False, True])
def test_an_output_of_a_merge_into_a_quantised_base_is_proven(packed: Packed, tmp_path: Path, dequantize: bool) -> None:
    plain, _, base = packed
    loratool.merge(base, plain.adapter, tmp_path / "merged", device=CPU, dequantize=dequantize)
    found = loratool.verify(tmp_path / "merged", base, plain.adapter, device=CPU, dequantize=dequantize)
    assert (found.verdict, codes(found)) == ("proven", []), str(found)
    assert found.tensors is not None
    assert {proof.equal for proof in found.tensors.values()} == {1.0}
    seen = loratool.verify(tmp_path / "merged", base, plain.adapter, device=CPU)
    assert (seen.verdict, seen.tensors) == ("proven", found.tensors)
    assert ("taken-as-dequantized" in [note.code for note in seen.notes]) == dequantize


def test_a_dequantised_base_is_proven_without_an_adapter(packed: Packed, tmp_path: Path) -> None:
    base = packed[2]
    loratool.merge(base, [], tmp_path / "plain", device=CPU, dequantize=True)
    found = loratool.verify(tmp_path / "plain", base, device=CPU, dequantize=True)
    assert (found.verdict, codes(found)) == ("proven", []), str(found)


def test_a_merge_into_decoded_weights_by_the_formula_is_proven_and_a_module_left_out_is_found(
    packed: Packed, tmp_path: Path
) -> None:
    """W₀ is what an independent decoder of the tests gives."""
    plain, made, base = packed
    tensors = {name: rounded(values.double(), torch.bfloat16) for name, values in made.values.items()}
    tensors |= {name: weight for name, weight in plain.weights.items() if name not in tensors}
    for name in plain.factors:
        tensors[name] = rounded(made.values[name].double() + plain.change(name), torch.bfloat16)
    out = plain.write(tensors, tmp_path / "merged")
    assert loratool.verify(out, base, plain.adapter, device=CPU, dequantize=True).verdict == "proven"
    name = random.Random(4).choice([*plain.factors])
    tensors[name] = rounded(made.values[name].double(), torch.bfloat16)
    out = plain.write(tensors, tmp_path / "merged")
    found = only(loratool.verify(out, base, plain.adapter, device=CPU, dequantize=True))
    assert (found.code, found.modules) == ("left-out", (name.removesuffix(".weight"),))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_merged_model_that_was_quantised_passes_where_every_element_is_the_nearest(kind: str, tmp_path: Path) -> None:
    """What survived is told; one element a step farther is found."""
    plain = scene(tmp_path / "scene", size=0.5)
    exact = {name: weight.double() for name, weight in projections(plain.weights).items()}
    exact |= {name: exact[name] + plain.change(name) for name in plain.factors}
    made = MAKERS[kind]({name: values.float() for name, values in exact.items()})
    others = {name: weight for name, weight in plain.weights.items() if name not in made.values}
    out = written(tmp_path / "merged", made, others)
    found = loratool.verify(out, plain.base, plain.adapter, device=CPU)
    assert (found.exit_code, codes(found)) == (0, ["quantised"]), str(found)
    gain = found.diagnoses[0].numbers["gains"]
    for name in plain.factors:
        change, applied = plain.change(name), made.values[name].double() - plain.weights[name].double()
        assert gain[name] == pytest.approx(float((applied * change).sum() / change.square().sum()), abs=0.02)
    name = random.Random(2).choice([*plain.factors])
    stored = name if name in made.tensors else name.replace("weight", "weight_packed")
    made.tensors[stored].view(torch.uint8).view(-1)[5] ^= 2
    out = written(tmp_path / "again", made, others)
    wrong = loratool.verify(out, plain.base, plain.adapter, device=CPU)
    assert (wrong.exit_code, codes(wrong)) == (5, ["elements-differ", "quantised"]), str(wrong)
    assert wrong.diagnoses[0].modules == (name.removesuffix(".weight"),)


def test_a_format_that_is_only_read_is_not_proven_and_the_sentence_says_why(tmp_path: Path) -> None:
    """Such as the K-quants of llama.cpp, which its `gguf` package does not write either."""
    pytest.importorskip("gguf")
    from gguf_models import Kind, llama_weights, write_llama

    plain, module, numbers = llama_weights(hidden=256), "blk.1.attn_v", torch.Generator().manual_seed(7)
    base = write_llama(tmp_path / "base.gguf", plain, Kind.F32)
    merged = write_llama(tmp_path / "merged.gguf", plain, Kind.F32, kinds={f"{module}.weight": Kind.Q4_K})
    name = "model.layers.1.self_attn.v_proj.weight"
    factors = torch.randn(RANK, 256, generator=numbers), torch.randn(len(plain[name]), RANK, generator=numbers)
    adapter = write_adapter(tmp_path / "adapter", {name: factors})
    found = loratool.verify(merged, base, adapter, device=CPU)
    assert (found.exit_code, codes(found)) == (5, ["quantised-unproven", "quantised"]), str(found)
    wrong = found.diagnoses[0]
    assert wrong.modules == (module,)
    assert "(Q4_K)" in wrong.text
    assert "reads but does not write" in wrong.text
