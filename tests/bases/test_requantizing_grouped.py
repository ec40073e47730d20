"""GPTQ and AWQ: values are packed again to the nearest ones that the base's own parameters give, or new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_anew import in_pieces
from packed_grouped import Grouped, awq_values, gptq_values
from packed_models import open_packed, save_packed
from peft_files import save_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room

Array = NDArray[Any]
MODULE = "model.layers.0.self_attn.q_proj"
CASES = {
    "4 bits": Grouped(16, 32, 4, 8),
    "2 bits": Grouped(16, 32, 2, 32),
    "3 bits": Grouped(32, 32, 3, 8),
    "8 bits": Grouped(16, 32, 8, 8),
    "act-order": Grouped(16, 32, 4, 8, shuffled=True),
    "last group short": Grouped(16, 32, 4, 12),
    "AWQ": Grouped(16, 32, 4, 8, lowest_zero=0),
}


def opened(folder: Path, case: str, version: int = 1) -> tuple[Requantizable, dict[str, Array]]:
    one = CASES[case]
    if case == "AWQ":
        tensors = one.awq(MODULE)
        config: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": one.group, "version": "gemm"}
    else:
        tensors = one.gptq(MODULE, less=2 - version)
        form = "gptq" if version == 1 else "gptq_v2"
        config = {"quant_method": "gptq", "bits": one.bits, "group_size": one.group, "checkpoint_format": form}
    weight = open_packed(save_packed(folder, tensors, config)).weights[f"{MODULE}.weight"]
    assert isinstance(weight, Requantizable)
    return weight, tensors


def stored_values(case: str, tensors: Mapping[str, Array], version: int = 1) -> Array:
    """What tensors mean, element by element."""
    one = CASES[case]
    return awq_values(tensors, MODULE, one.group) if case == "AWQ" else gptq_values(tensors, MODULE, one.bits, version)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", [1, 2])
def test_values_of_the_base_keep_their_bytes(tmp_path: Path, case: str, version: int) -> None:
    weight, tensors = opened(tmp_path / "base", case, version)
    values = torch.from_numpy(CASES[case].values())
    packed, decoded = in_pieces(weight, values, weight.parameters(Room()))
    assert torch.equal(decoded, values)
    assert weight.laid_out(packed).numpy().tobytes() == tensors[f"{MODULE}.qweight"].tobytes()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("new", [False, True])
def test_each_value_becomes_the_nearest_that_its_group_has(tmp_path: Path, case: str, new: bool) -> None:
    """What is written is read back element by element, and no other integer would have been nearer."""
    weight, tensors = opened(tmp_path / "base", case)
    one = CASES[case]
    values = torch.randn(one.outputs, one.inputs, generator=torch.Generator().manual_seed(1)) * 0.02
    parameters = weight.parameters(Room())
    if new:
        pieces = [weight.measure(values[first:][: weight.together]) for first in range(0, len(values), weight.together)]
        parameters = weight.new_parameters(torch.cat(pieces), parameters)
    packed, decoded = in_pieces(weight, values, parameters)
    words = weight.laid_out(packed).view(torch.int32).view(*tensors[f"{MODULE}.qweight"].shape).numpy()
    written = {**{name: part.numpy() for name, part in parameters.items()}, f"{MODULE}.qweight": words}
    assert {name: (part.shape, part.dtype) for name, part in written.items()} == {
        name: (part.shape, part.dtype) for name, part in tensors.items()
    }
    assert np.array_equal(decoded.numpy(), stored_values(case, written))
    check_nearest(case, written, decoded, values)
    if new:
        check_range(one, written[f"{MODULE}.scales"], values)


def check_nearest(case: str, written: Mapping[str, Array], decoded: Tensor, values: Tensor) -> None:
    """Each value is half a step from what it became at most, or from the end of its group's range."""
    one = CASES[case]
    ends = []
    for integer in (0, 2**one.bits - 1):
        same = one.packed_integers(np.full((one.outputs, one.inputs), integer), awq=case == "AWQ")
        ends.append(stored_values(case, {**written, f"{MODULE}.qweight": same}).astype(np.float64))
    step = (ends[1] - ends[0]) / (2**one.bits - 1)
    errors = np.abs(decoded.double().numpy() - np.clip(values.double().numpy(), *ends))
    assert (errors <= step / 2 * 1.0001).all()


def check_range(one: Grouped, scales: Array, values: Tensor) -> None:
    """A scale is what a group's smallest and largest value are apart, in steps, 0 being one of both."""
    for group in range(one.groups):
        members = values.numpy()[:, one.group_of == group]
        apart = np.maximum(members.max(1), 0) - np.minimum(members.min(1), 0)
        assert scales[group] == pytest.approx(apart / (2**one.bits - 1), rel=1e-3)


def test_zero_points_in_the_middle_stay_there(tmp_path: Path) -> None:
    """The base is symmetric, so that servers with kernels for that alone still take it."""
    one = Grouped(8, 32, 4, 16)
    tensors = one.gptq(MODULE)
    tensors[f"{MODULE}.qzeros"][:] = 0x77777777
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
    weight = open_packed(save_packed(tmp_path / "base", tensors, config)).weights[f"{MODULE}.weight"]
    assert isinstance(weight, Requantizable)
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    values[3, 16:] = 0
    own = weight.parameters(Room())
    parameters = weight.new_parameters(weight.measure(values), own)
    assert torch.equal(parameters[f"{MODULE}.qzeros"], own[f"{MODULE}.qzeros"])
    largest = values.view(8, 2, 16).abs().amax(2).T * 2 / 15
    scales = parameters[f"{MODULE}.scales"].float()
    assert scales[1, 3] == own[f"{MODULE}.scales"][1, 3]  # a group without a range keeps its scale
    scales[1, 3] = 0
    assert torch.allclose(scales, largest, rtol=1e-3)


@pytest.mark.parametrize("case", ["4 bits", "3 bits", "act-order", "AWQ"])
def test_a_merge_packs_edited_weights_anew(tmp_path: Path, case: str) -> None:
    """Read back element by element, each value is next to the exact sum, and the config says what it said."""
    one = CASES[case]
    base = tmp_path / "base"
    opened(base, case)
    draws = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, one.inputs, generator=draws) / 8, torch.randn(one.outputs, 2, generator=draws) / 8
    factors = {f"base_model.model.{MODULE}.lora_{name}.weight": x for name, x in (("A", down), ("B", up))}
    save_peft(tmp_path / "adapter", factors, r=2, lora_alpha=2)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out", requantize=True, accept_loss=True)
    found = stored_in(tmp_path / "out")
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in stored_in(base).items()
    }
    exact = torch.from_numpy(one.values()).double() + up.double() @ down.double()
    check_nearest(case, found, torch.from_numpy(stored_values(case, found)), exact)
    said = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    assert said[0]["quantization_config"] == said[1]["quantization_config"]


def stored_in(folder: Path) -> dict[str, Array]:
    return {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}
