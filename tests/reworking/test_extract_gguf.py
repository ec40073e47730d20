"""Adapters out of two GGUF models of llama.cpp, whose names and rows are its own and whose values may be packed.

The differences are those of what the `gguf` package decodes; ΔW of the adapter is their best approximation by numpy's SVD.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_model
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.files.gguf import read_gguf

gguf_models = pytest.importorskip("gguf_models", reason="the gguf package writes the models")
Kind = gguf_models.Kind
RANK = 2
PROJECTIONS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(
    f"mlp.{p}_proj" for p in ("gate", "up", "down")
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    found: dict[str, Tensor] = gguf_models.llama_weights()
    return found


@pytest.fixture(scope="module")
def tuned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every projection changed by a product of rank 2."""
    generator = torch.Generator().manual_seed(7)

    def moved(name: str, weight: Tensor) -> Tensor:
        if not name.removesuffix(".weight").endswith(PROJECTIONS):
            return weight
        rows, columns = weight.shape
        factors = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
        return weight + 0.1 * factors[0] @ factors[1]

    return {name: moved(name, weight) for name, weight in weights.items()}


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The values of a file by its names, as the `gguf` package decodes them."""
    reader = gguf_models.gguf.GGUFReader(path)
    return {
        tensor.name: np.asarray(gguf_models.quants.dequantize(tensor.data, tensor.tensor_type), np.float64)
        for tensor in reader.tensors
    }


def deltas(path: Path) -> dict[str, np.ndarray]:
    """α / r · BA by the names of the file, as llama.cpp multiplies it."""
    values, alpha = decoded(path), float(read_gguf(path).values["adapter.lora.alpha"])  # type: ignore[arg-type]  # a number
    names = [name.removesuffix(".lora_a") for name in values if name.endswith(".lora_a")]
    return {n: alpha / len(values[f"{n}.lora_a"]) * values[f"{n}.lora_b"] @ values[f"{n}.lora_a"] for n in names}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_an_adapter_is_the_best_approximation_of_what_both_files_decode_to(
    weights: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    """In the names and the order of llama.cpp, for which it is written unless another dialect is asked for."""
    base = gguf_models.write_llama(tmp_path / "base.gguf", weights, Kind[kind])
    after = gguf_models.write_llama(tmp_path / "tuned.gguf", tuned, Kind[kind])
    report = loratool.extract(base, after, tmp_path / "adapter.gguf", rank=3, exact=True, dtype="float32")
    one, two, found = decoded(base), decoded(after), deltas(tmp_path / "adapter.gguf")
    differing = {name for name, values in two.items() if not np.array_equal(values, one[name])}
    assert found.keys() == differing
    assert len(found) == len(PROJECTIONS) * gguf_models.LAYERS
    assert report.identical == len(one) - len(found)
    for name, delta in found.items():
        u, s, v = np.linalg.svd(two[name] - one[name], full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert np.linalg.norm(delta - best) <= 1e-5 * np.linalg.norm(best)


def test_an_adapter_for_transformers_has_its_names_and_its_order_of_rows(
    weights: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    base = gguf_models.write_llama(tmp_path / "base.gguf", weights, Kind.F32)
    after = gguf_models.write_llama(tmp_path / "tuned.gguf", tuned, Kind.F32)
    loratool.extract(base, after, tmp_path / "peft", rank=RANK, to="peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    changed = [name for name, weight in weights.items() if not torch.equal(weight, tuned[name])]
    assert len(tensors) == 2 * len(changed)
    for name in changed:
        a, b = (
            tensors[f"base_model.model.{name.replace('.weight', f'.lora_{side}.weight')}"].double() for side in "AB"
        )
        wanted = tuned[name].double() - weights[name].double()
        assert float((config["lora_alpha"] / config["r"] * b @ a - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_a_head_that_is_tied_is_in_no_file(
    weights: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    """Llama.cpp stores the embedding once where the model ties both; the adapter is that of the same models with a head."""
    made = {}
    for name, leave in (("tied", {"lm_head.weight"}), ("untied", set[str]())):
        base, after = [
            gguf_models.write_llama(tmp_path / f"{name}-{at}.gguf", {n: w for n, w in each.items() if n not in leave})
            for at, each in enumerate((weights, tuned))
        ]
        loratool.extract(base, after, tmp_path / f"{name}.gguf", rank=RANK)
        made[name] = deltas(tmp_path / f"{name}.gguf")
    assert "output.weight" not in decoded(tmp_path / "tied-0.gguf")
    assert made["tied"].keys() == made["untied"].keys()
    assert all(np.array_equal(delta, made["untied"][name]) for name, delta in made["tied"].items())


def test_base_and_adapter_merge_to_the_tuned_model(
    weights: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    base = gguf_models.write_llama(tmp_path / "base.gguf", weights, Kind.F32)
    after = gguf_models.write_llama(tmp_path / "tuned.gguf", tuned, Kind.F32)
    loratool.extract(base, after, tmp_path / "adapter.gguf", rank=RANK)
    loratool.merge(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf")
    merged, wanted = decoded(tmp_path / "merged.gguf"), decoded(after)
    assert merged.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.allclose(merged[name], values, rtol=1e-5, atol=1e-6), name


def test_what_a_file_stores_otherwise_is_left_out_by_name_and_a_norm_has_no_place_in_llama_cpp(tmp_path: Path) -> None:
    """Gemma's norms are stored with 1 added, and a bias of queries in llama.cpp's order of rows."""
    matrix = {"blk.0.attn_v.weight": np.ones((8, 32), np.float32)}
    norm, bias = {"blk.0.attn_norm.weight": np.ones(32, np.float32)}, {"blk.0.attn_q.bias": np.ones(8, np.float32)}
    cases = (
        ("gemma", norm, "with 1 added"),
        ("llama", bias, "in another order"),
        ("llama", {"blk.0.odd": norm[next(iter(norm))]}, "not known"),
    )
    for at, (architecture, beside, why) in enumerate(cases):
        for name, factor in (("base", 1), ("tuned", 2)):
            tensors = {**matrix, **beside}
            gguf_models.write_tensors(
                tmp_path / f"{at}-{name}.gguf", architecture, {n: factor * values for n, values in tensors.items()}
            )
        report = loratool.extract(
            tmp_path / f"{at}-base.gguf", tmp_path / f"{at}-tuned.gguf", tmp_path / f"{at}", rank=1, to="peft"
        )
        assert list(report.modules) == ["model.layers.0.self_attn.v_proj.weight"]
        (reason,) = report.left_out.values()
        assert why in reason
    for name, factor in (("base", 1), ("tuned", 2)):
        made = {n: factor * values for n, values in {**matrix, **norm}.items()}
        gguf_models.write_tensors(tmp_path / f"{name}.gguf", "llama", made)
    with pytest.raises(loratool.FitError, match="input_layernorm"):
        loratool.extract(tmp_path / "base.gguf", tmp_path / "tuned.gguf", tmp_path / "out.gguf", rank=1)


def test_a_model_of_llama_cpp_and_one_of_transformers_are_not_compared(
    weights: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    base = gguf_models.write_llama(tmp_path / "base.gguf", weights, Kind.F32)
    other = save_model(tmp_path / "other", tuned, {"model_type": "llama"})
    for one, two in ((base, other), (other, base)):
        with pytest.raises(loratool.FitError, match=r"base\.gguf is a GGUF model and other is not"):
            loratool.extract(one, two, tmp_path / "out", rank=RANK)
