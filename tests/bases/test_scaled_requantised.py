"""Weights of FP8, compressed-tensors, ModelOpt and MXFP4 go back into their formats as the nearest numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from packed_models import DEVICES, open_packed, save_packed
from quantised_models import FAMILIES, STACKS, Quantised
from torch import Tensor

from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room

CPU = torch.device("cpu")
NAME = "model.layers.0.mlp.down_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
EVERY = [*FAMILIES, *STACKS]
# Bytes that are all the same do not hold every number of so many bits.
UNTRIED = ("int3 groups", "int5 rows", "int6 groups", "int7 rows")


def plain(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made_of(family: str, seed: int) -> Quantised:
    if family in STACKS:
        return STACKS[family]({EXPERTS: plain(seed, 2, 64, 26)})
    return FAMILIES[family]({NAME: plain(seed, 38, 96)})


def open_weight(folder: Path, made: Quantised, changed: Mapping[str, Tensor]) -> Requantizable:
    path = save_packed(folder, {**made.tensors, **changed}, made.config)
    for name, content in made.files.items():
        (path / name).write_text(json.dumps(content))
    [weight] = open_packed(path).weights.values()
    assert isinstance(weight, Requantizable)
    return weight


def lines_of(weight: Requantizable) -> Tensor:
    count = weight.matrix(weight.line).shape[0]
    return weight.matrix(weight.line).rows(0, count, CPU, torch.float32, Room())


def packed_anew(weight: Requantizable, lines: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The bytes of all lines, and what they are decoded to, a few lines at a time; on a GPU where there is one."""
    step = weight.together * -(-9 // weight.together)
    starts = range(0, len(lines), step)
    packed = [weight.encode(lines[first : first + step].to(DEVICES[-1]), first, parameters) for first in starts]
    back = [
        weight.decode_packed(part, first, min(step, len(lines) - first), parameters)
        for part, first in zip(packed, starts, strict=True)
    ]
    return torch.cat(packed).cpu(), torch.cat(back).cpu()


@pytest.mark.parametrize("family", EVERY)
def test_values_that_have_not_changed_are_packed_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    weight = open_weight(tmp_path / "base", made_of(family, 1), {})
    lines = lines_of(weight)
    own = weight.parameters(Room())
    assert own.keys() == {tensor.info.name for tensor in weight.tensors[1:]}
    packed, back = packed_anew(weight, lines, own)
    stored = torch.empty(weight.tensors[0].info.nbytes, dtype=torch.uint8)
    weight.tensors[0].read(0, stored.numpy().data)
    assert torch.equal(weight.laid_out(packed), stored)
    assert torch.equal(back, lines)


@pytest.mark.parametrize("family", EVERY)
def test_new_parameters_and_values_are_decoded_from_a_file_to_what_was_promised(tmp_path: Path, family: str) -> None:
    made = made_of(family, 2)
    weight = open_weight(tmp_path / "base", made, {})
    lines = lines_of(weight) * 1.3 + 0.02
    measured = torch.cat([weight.measure(part.to(DEVICES[-1])) for part in torch.split(lines, weight.together * 5)])
    new = weight.new_parameters(measured, weight.parameters(Room()))
    packed, back = packed_anew(weight, lines, new)
    values = made.tensors[weight.tensors[0].info.name]
    changed = {weight.tensors[0].info.name: weight.laid_out(packed).clone().view(values.dtype).view(values.shape)}
    assert {name: (part.dtype, part.shape) for name, part in new.items()} == {
        name: (made.tensors[name].dtype, made.tensors[name].shape) for name in new
    }
    again = open_weight(tmp_path / "again", made, {**changed, **{name: part.clone() for name, part in new.items()}})
    assert again.check(Room()) == ""
    assert torch.equal(lines_of(again), back)
    largest = 0.15 if "4" in family or "int3" in family or family == "gpt-oss" else 0.06
    assert (back - lines).norm() < largest * lines.norm() * (2 if "int3" in family else 1)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNTRIED])
def test_each_value_goes_to_the_nearest_number(tmp_path: Path, family: str) -> None:
    """No number of the format, with the scale and the zero point that it is packed with, is nearer: all are tried."""
    weight = open_weight(tmp_path / "base", made_of(family, 3), {})
    own = weight.parameters(Room())
    lines = lines_of(weight) + 0.01 * plain(4, 38, 96)
    _, back = packed_anew(weight, lines, own)
    nearest = torch.full((38, 96), float("inf"), dtype=torch.float64)
    for byte in range(256):  # all numbers of up to 8 bits, and every two of 4 bits
        width = weight.tensors[0].info.nbytes // (38 // weight.together)
        tried = weight.decode_packed(torch.full((width * 38 // weight.together,), byte, dtype=torch.uint8), 0, 38, own)
        nearest = torch.minimum(nearest, (tried.double() - lines.double()).abs().nan_to_num(float("inf")))
    distance = (back.double() - lines.double()).abs()
    assert bool((distance <= nearest * (1 + 1e-6) + 1e-9).all())


OF_COMPRESSED_TENSORS = {
    "int4 groups": 0,
    "int4 groups, zero points": 0,
    "int8 packed, rows": 0,
    "int3 groups": 16,
    "int5 rows": 0,
    "int7 rows": 0,
    "int8 (W8A8)": 96,
    "int8, zero points": 96,
    "float8 one scale": 0,
    "float8 rows": 96,
    "float8 blocks": 0,
    "mxfp8": 32,
    "nvfp4": 16,
    "mxfp4": 32,
}


@pytest.mark.parametrize("family", OF_COMPRESSED_TENSORS)
def test_compressed_tensors_packs_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    """With the same scales; and scales for groups of so many columns, where it gives float32 ones, are the same too."""
    compressors = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    library = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    made = made_of(family, 5)
    weight = open_weight(tmp_path / "base", made, {})
    lines, own = lines_of(weight) + 0.02 * plain(6, 38, 96), weight.parameters(Room())
    group = {**made.config["config_groups"]["group_0"]}
    if family.startswith("mx"):
        group["weights"] = {**group["weights"], "scale_dtype": "torch.uint8"}
    scheme = library.QuantizationScheme(**group)
    stem = NAME.removesuffix("weight")
    if columns := OF_COMPRESSED_TENSORS[family]:
        grouped = lines.view(38, -1, columns)
        own = weight.new_parameters(weight.measure(lines), own)
        whole = own.get(f"{stem}weight_global_scale")
        theirs = helpers.calculate_qparams(grouped.amin(2), grouped.amax(2), scheme.weights, whole)
        scales = own[f"{stem}weight_scale"]
        if family.startswith("mx"):
            scales = torch.exp2(scales.float() - 127)
        assert torch.equal(scales.float(), theirs[0].to(scales.dtype).float())
    state = {name.removeprefix(stem): part for name, part in own.items()}
    state["weight_scale"] = state["weight_scale"].float()
    if family.startswith("mx"):
        state["weight_scale"] = torch.exp2(state["weight_scale"] - 127)
    zeros = state.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        unpack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
        state["weight_zero_point"] = unpack(zeros, scheme.weights.num_bits, (38, state["weight_scale"].shape[1]), 0)
    state.pop("weight_shape", None)
    packed = compressors.get_value_from_registry(made.config["format"]).compress({**state, "weight": lines}, scheme)
    theirs_packed = packed.get("weight_packed", packed.get("weight"))
    assert torch.equal(weight.encode(lines, 0, own), theirs_packed.contiguous().view(-1).view(torch.uint8))
