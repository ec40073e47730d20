"""Adapters out of models of which one is quantised, or both: differences of decoded weights."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from packed_bnb import FourBit
from packed_models import save_packed
from safetensors.numpy import load_file

import loratool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

LAYER = "model.layers.0."
QUERY, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"
PACKED = {
    f"{QUERY}.weight": FourBit((48, 32), "nf4", 64, 4, seed=1),
    f"{DOWN}.weight": FourBit((32, 40), "nf4", 64, 4, seed=2),
}
VALUES = {name: packed.values(name) for name, packed in PACKED.items()}
PLAIN = {"model.embed_tokens.weight": np.ones((20, 32), np.float32), "lm_head.weight": np.ones((20, 32), np.float32)}
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def packed(*but: str) -> dict[str, NDArray[Any]]:
    """The tensors of the packed weights, some left out."""
    return {part: value for name in PACKED if name not in but for part, value in PACKED[name].tensors(name).items()}


def delta(name: str, seed: int = 7) -> NDArray[Any]:
    """Of rank 2."""
    numbers = np.random.default_rng(seed)
    rows, columns = PACKED[name].shape
    return (numbers.standard_normal((rows, 2)) @ numbers.standard_normal((2, columns))).astype(np.float32)


def save(folder: Path, tensors: Arrays) -> Path:
    is_packed = any(".quant_state." in name for name in tensors)
    return save_packed(folder, {**PLAIN, **tensors}, CONFIG if is_packed else None, architectures=["LlamaForCausalLM"])


def products(folder: Path) -> dict[str, NDArray[Any]]:
    """B·A of every module of an adapter, whose scaling is 1."""
    factors = load_file(folder / "adapter_model.safetensors")
    downs = [name for name in factors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): factors[name.replace("_A", "_B")]
        .astype(np.float64)
        .dot(factors[name])
        for name in downs
    }


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("rank", [2, "auto"])
def test_what_was_added_to_the_decoded_base_is_found(tmp_path: Path, rank: Any) -> None:
    """The other weights of TUNED are the decoded ones, so they do not differ."""
    name = f"{QUERY}.weight"
    base = save(tmp_path / "base", packed())
    tuned = save(tmp_path / "tuned", {**VALUES, name: VALUES[name] + delta(name)})
    report = loratool.extract(base, tuned, tmp_path / "out", rank=rank, device="cpu")
    (found,) = products(tmp_path / "out").items()
    assert found[0] == QUERY
    assert relative(found[1], delta(name)) < 1e-5
    assert report.identical == 3
    assert [note.code for note in report.notes if "quantised" in note.code] == ["quantised-difference"]


def test_a_touched_only_merge_of_a_quantised_base_gives_its_adapter_back(tmp_path: Path) -> None:
    """Whatever stayed packed is the same bytes, so nothing of it is decoded to compare."""
    name = f"{DOWN}.weight"
    base = save(tmp_path / "base", packed())
    tuned = save(tmp_path / "tuned", {**packed(name), name: VALUES[name] + delta(name)})
    loratool.extract(base, tuned, tmp_path / "out", rank=2, device="cpu")
    found = products(tmp_path / "out")
    assert found.keys() == {DOWN}
    assert relative(found[DOWN], delta(name)) < 1e-5


def test_the_record_of_an_adapter_tells_that_its_base_was_quantised(tmp_path: Path) -> None:
    """Of a copy too, and wherever that base is by then: a merge into a plain base has the note, one into its like has not."""
    name = f"{QUERY}.weight"
    base = save(tmp_path / "base", packed())
    tuned = save(tmp_path / "tuned", {**VALUES, name: VALUES[name] + delta(name)})
    loratool.extract(base, tuned, tmp_path / "out", rank=2, device="cpu")
    loratool.resize(tmp_path / "out", tmp_path / "copy", rank=1, device="cpu")
    plain, again = save(tmp_path / "plain", VALUES), save(tmp_path / "other" / "packed", packed())
    rmtree(base)
    for adapter in ("out", "copy"):
        plan = loratool.plan(plain, tmp_path / adapter, tmp_path / "merged", device="cpu")
        (note,) = (str(note) for note in plan.notes if note.code == "trained-quantised")
        assert "bitsandbytes, as its loratool.json says" in note
        plan = loratool.plan(again, tmp_path / adapter, tmp_path / "merged", device="cpu")
        assert not {"trained-quantised", "trained-plain"} & {note.code for note in plan.notes}


def test_tuned_may_be_the_quantised_one(tmp_path: Path) -> None:
    name = f"{QUERY}.weight"
    base = save(tmp_path / "base", {**VALUES, name: VALUES[name] - delta(name)})
    tuned = save(tmp_path / "tuned", packed())
    loratool.extract(base, tuned, tmp_path / "out", rank=2, dtype="float32", device="cpu")
    found = products(tmp_path / "out")
    assert found.keys() == {QUERY}
    assert relative(found[QUERY], delta(name)) < 1e-5


def test_two_quantised_models_are_compared_by_their_values(tmp_path: Path) -> None:
    """Packed in another way, here with other blocks, a weight is another."""
    name = f"{QUERY}.weight"
    other = FourBit((48, 32), "nf4", 32, 0, seed=5)
    base = save(tmp_path / "base", packed())
    tuned = save(tmp_path / "tuned", {**packed(name), **other.tensors(name)})
    loratool.extract(base, tuned, tmp_path / "out", rank=32, dtype="float32", device="cpu")
    found = products(tmp_path / "out")
    assert found.keys() == {QUERY}
    assert relative(found[QUERY], other.values(name).astype(np.float64) - VALUES[name]) < 1e-5


def test_quantised_models_of_the_same_bytes_are_identical(tmp_path: Path) -> None:
    base, tuned = (save(tmp_path / name, packed()) for name in ("base", "tuned"))
    with pytest.raises(loratool.FitError, match="identical"):
        loratool.extract(base, tuned, tmp_path / "out", device="cpu")


def test_a_quantised_module_is_not_saved_whole(tmp_path: Path) -> None:
    """An adapter holds plain tensors. A table of a new size would have to be saved with all its rows."""
    name, table = f"{QUERY}.weight", "model.embed_tokens.weight"
    grown = FourBit((24, 32), "nf4", 64, 0, seed=9)
    base = save(tmp_path / "base", VALUES)
    tuned = save(tmp_path / "tuned", {**VALUES, name: VALUES[name] + delta(name), **grown.tensors(table)})
    report = loratool.extract(base, tuned, tmp_path / "out", rank=2, device="cpu")
    assert products(tmp_path / "out").keys() == {QUERY}
    assert "quantised" in report.left_out[table]


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    name = f"{QUERY}.weight"
    broken = packed()
    broken[f"{name}.nested_absmax"][0] = np.inf
    base = save(tmp_path / "base", broken)
    with pytest.raises(loratool.InputError) as refused:
        loratool.extract(base, save(tmp_path / "tuned", VALUES), tmp_path / "out", rank=2, device="cpu")
    assert f"{name}.nested_absmax" in str(refused.value)
