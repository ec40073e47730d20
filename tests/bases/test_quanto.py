"""quanto: decoded rows are the documented formula, and a module that becomes plain leaves the map of packed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_models import check_rows, open_packed, save_packed
from peft_files import save_peft
from safetensors.torch import load_file

import loratool
from loratool.bases.codecs.quanto import MAP
from loratool.bases.weights import Room

Array = NDArray[Any]

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
OTHER = "model.layers.0.mlp.up_proj"


def tensors_of(module: str, scale: tuple[int, ...]) -> dict[str, Array]:
    numbers = np.random.default_rng(0)
    return {
        f"{module}.weight._data": numbers.integers(-127, 128, (6, 32), np.int8),
        f"{module}.weight._scale": numbers.random(scale, np.float32),
        f"{module}.input_scale": np.ones((), np.float32),
        f"{module}.output_scale": np.ones((), np.float32),
    }


def save_map(folder: Path, *modules: str) -> Path:
    said = {module: {"weights": "qint8", "activations": "none"} for module in modules}
    (folder / "quanto_qmap.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("scale", [(6, 1), (1, 32), (1, 1), ()])
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_values_are_scaled(tmp_path: Path, scale: tuple[int, ...], dtype: str) -> None:
    tensors = tensors_of(MODULE, scale)
    as_tensors = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    if dtype == "float8":
        as_tensors[f"{NAME}._data"] = as_tensors[f"{NAME}._data"].float().to(torch.float8_e4m3fn)
    values, factors = as_tensors[f"{NAME}._data"].float().numpy(), np.broadcast_to(tensors[f"{NAME}._scale"], (6, 32))
    wanted = np.array([[v * f for v, f in zip(*rows, strict=True)] for rows in zip(values, factors, strict=True)])
    check_rows(save_map(save_packed(tmp_path / "base", as_tensors, None), MODULE), NAME, wanted)


def test_a_plain_module_leaves_the_map_and_its_other_scales_go(tmp_path: Path) -> None:
    tensors = {**tensors_of(MODULE, (6, 1)), **tensors_of(OTHER, (6, 1))}
    base = open_packed(save_map(save_packed(tmp_path / "base", tensors, None), MODULE, OTHER))
    (model,) = base.models
    (place,) = model.settings.places
    said = model.left_plain(place, [NAME])
    assert said == {OTHER: {"weights": "qint8", "activations": "none"}}
    assert base.left_over([NAME]) == {f"{MODULE}.input_scale", f"{MODULE}.output_scale"}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "weight._scale",
            np.ones((5, 1), np.float32),
            "one scale for each row or column of [6, 32], or one for all, but",
        ),
        ("weight._scale", None, "weight._scale: must be F64 or F32 or F16 or BF16, but it is missing"),
        ("weight._data", np.ones((6, 32), np.int32), "weight._data: must be I8 or F8_E4M3 or F8_E5M2, but it is I32"),
        (
            "weight",
            np.ones((6, 32), np.float32),
            "weight: is there as well as model.layers.0.self_attn.q_proj.weight._d",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, name: str, value: Array | None, problem: str) -> None:
    tensors = tensors_of(MODULE, (6, 1))
    tensors.pop(f"{MODULE}.{name}", None)
    if value is not None:
        tensors[f"{MODULE}.{name}"] = value
    with pytest.raises(loratool.InputError) as caught:
        open_packed(save_map(save_packed(tmp_path / "base", {**tensors, **broken()}, None)))
    assert problem in str(caught.value)
    assert f"{OTHER}.weight._scale: must be F64" in str(caught.value)


def test_a_plain_weight_that_the_map_calls_packed_is_refused(tmp_path: Path) -> None:
    """`requantize` of quanto would look for its packed values; one that is mapped for its inputs alone is plain."""
    tensors = {**tensors_of(MODULE, (6, 1)), f"{OTHER}.weight": np.zeros((6, 32), np.float32)}
    folder = save_map(save_packed(tmp_path / "base", tensors, None), MODULE, OTHER)
    with pytest.raises(loratool.InputError) as caught:
        open_packed(folder)
    assert f"{OTHER}.weight: is F32 [6, 32], but quanto_qmap.json says that it is packed" in str(caught.value)
    said = json.loads((folder / "quanto_qmap.json").read_text())
    said[OTHER] = {"weights": "none", "activations": "qint8"}
    (folder / "quanto_qmap.json").write_text(json.dumps(said))
    assert [*open_packed(folder).weights] == [NAME]


@pytest.mark.parametrize("options", [{}, {"requantize": True}])
def test_quanto_itself_loads_a_merged_model_and_computes_what_the_base_does_with_the_adapter(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """By its `requantize`, which packs the layers of the map and takes the values that the file has for them."""
    library: Any = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    net: Any = torch.nn.ModuleDict({"first": torch.nn.Linear(17, 9), "second": torch.nn.Linear(9, 5)})
    library.quantize(net, weights=library.qint8)
    library.freeze(net)
    base = save_packed(tmp_path / "base", {k: v.detach() for k, v in net.state_dict().items()}, None)
    (base / MAP).write_text(json.dumps(library.quantization_map(net)))
    up, down = torch.randn(5, 2), torch.randn(2, 9)
    factors = {"base_model.model.second.lora_A.weight": down, "base_model.model.second.lora_B.weight": up}
    adapter = save_peft(tmp_path / "adapter", factors, r=2, lora_alpha=2)
    loratool.merge(base, adapter, tmp_path / "out", device="cpu", dtype="float32", **options)
    merged: Any = torch.nn.ModuleDict({"first": torch.nn.Linear(17, 9), "second": torch.nn.Linear(9, 5)})
    state, table = load_file(tmp_path / "out" / "model.safetensors"), json.loads((tmp_path / "out" / MAP).read_text())
    library.requantize(merged, state, table)
    assert table.keys() == {"first", *(["second"] if options else [])}
    inputs = torch.randn(4, 9)
    wanted = net["second"](inputs) + inputs @ down.T @ up.T
    assert torch.equal(merged["first"](torch.ones(2, 17)), net["first"](torch.ones(2, 17)))
    step = float(merged["second"].weight._scale.max()) if options else 1e-6
    assert (merged["second"](inputs) - wanted).abs().max() <= step / 2 * float(inputs.abs().sum(1).max()) + 1e-5


def broken() -> dict[str, Array]:
    tensors = tensors_of(OTHER, (6, 1))
    tensors.pop(f"{OTHER}.weight._scale")
    return tensors


@pytest.mark.parametrize(("wrong", "problem"), [(np.nan, "NaN or infinite"), (-1, "negative")])
def test_scales_that_no_quantiser_writes_are_told(tmp_path: Path, wrong: float, problem: str) -> None:
    tensors = tensors_of(MODULE, (6, 1))
    tensors[f"{NAME}._scale"][2] = wrong
    weight = open_packed(save_packed(tmp_path / "base", tensors, None)).weights[NAME]
    assert weight.check(Room()) == f"{NAME}._scale: 1 of 6 values are {problem}"
