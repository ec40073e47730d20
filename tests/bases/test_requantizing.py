"""Values are packed again to the nearest ones that the base's own parameters give, or new ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_affine import description
from packed_anew import in_pieces
from packed_bnb import FourBit, int8
from packed_models import open_packed, save_packed
from torch import Tensor

from loratool.bases.codecs.parts import nearest
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room

Array = NDArray[Any]

CPU = torch.device("cpu")
NAME = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"quant_method": "bitsandbytes"}
NF4 = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])


def opened(folder: Path, tensors: Mapping[str, Any]) -> Requantizable:
    weight = open_packed(save_packed(folder, tensors, CONFIG)).weights[NAME]
    assert isinstance(weight, Requantizable)
    return weight


@pytest.mark.parametrize(
    "entries",
    [
        NF4.tolist(),
        [0, 0.01, 8, 12, 4, 6, 2, 3, -0.01, -8, -12, -4, -6, -2, -3],
        np.linspace(-1, 1, 255).tolist(),
        [0, 1e-9, 1.001e-9, 5],  # two edges next to each other
    ],
)
def test_many_values_go_to_the_nearest_entry_of_a_table_in_any_order(entries: list[float]) -> None:
    """The edges between entries are there too, with the numbers next to them. Of two entries as near, either is right."""
    table = torch.tensor(entries)
    ordered = table.sort().values.double()
    edges = ((ordered[1:] + ordered[:-1]) / 2).float()
    near = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-math.inf, math.inf)]
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 16, np.float32)) * table.abs().amax() / 2
    values = torch.cat([drawn, edges, *near, torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan])])
    wanted = values.nan_to_num(0.0).double()[:, None]
    distances = (wanted - table.double()).abs()
    found = nearest(values, table)
    assert found.dtype == torch.uint8
    rounding = wanted[:, 0].abs() * 2.0**-24 + 1e-45  # an edge is a float32
    assert (distances.gather(1, found.long()[:, None])[:, 0] <= distances.amin(1) + 2 * rounding).all()


def four_bit(tmp_path: Path, shape: tuple[int, ...], nested: int) -> Requantizable:
    tensors = FourBit(shape, "nf4", 32, nested).tensors(NAME)
    tensors[f"{NAME}.quant_map"] = NF4.numpy()
    if nested:  # a byte b means (b − 128) / 127, around an offset within the nested statistics
        tensors[f"{NAME}.nested_quant_map"] = (np.arange(256, dtype=np.float32) - 128) / 127
    return opened(tmp_path / "base", tensors)


def new_parameters(weight: Requantizable, values: Tensor) -> Mapping[str, Tensor]:
    pieces = [weight.measure(values[first:][: weight.together]) for first in range(0, len(values), weight.together)]
    return weight.new_parameters(torch.cat(pieces), weight.parameters(Room()))


def lines_of(weight: Requantizable) -> Tensor:
    return weight.rows(0, weight.shape[0], CPU, torch.float32, Room()).view(-1, weight.line)


@pytest.mark.parametrize("nested", [0, 3])
@pytest.mark.parametrize("shape", [(6, 64), (9, 37), (3, 4, 24)])
def test_values_of_the_base_keep_their_bytes(tmp_path: Path, shape: tuple[int, ...], nested: int) -> None:
    weight = four_bit(tmp_path, shape, nested)
    packed, decoded = in_pieces(weight, lines_of(weight), weight.parameters(Room()))
    assert torch.equal(decoded, lines_of(weight))
    stored = FourBit(shape, "nf4", 32, nested).tensors(NAME)[NAME].ravel()
    assert torch.equal(weight.laid_out(packed), torch.from_numpy(stored.copy()))


@pytest.mark.parametrize("nested", [0, 3])
@pytest.mark.parametrize("shape", [(6, 64), (9, 37)])
@pytest.mark.parametrize("new", [False, True])
def test_each_value_becomes_the_nearest_of_its_block(
    tmp_path: Path, shape: tuple[int, int], nested: int, new: bool
) -> None:
    weight = four_bit(tmp_path, shape, nested)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3
    parameters = new_parameters(weight, values) if new else weight.parameters(Room())
    _, decoded = in_pieces(weight, values, parameters)
    absmax = absmax_of(parameters, nested)
    scale = absmax[np.arange(values.numel()) // 32]
    choices = scale[:, None] * NF4.double().numpy()  # 16 for each value
    errors = np.abs(values.double().numpy().ravel()[:, None] - choices)
    got = np.abs(values.double().numpy().ravel() - decoded.double().numpy().ravel())
    assert np.allclose(got, errors.min(1), rtol=1e-5, atol=1e-7)
    if new:
        flat = np.abs(values.numpy().ravel())
        largest = [flat[at : at + 32].max() for at in range(0, len(flat), 32)]
        assert np.allclose(absmax, largest, rtol=0, atol=0.02 if nested else 0)


def absmax_of(parameters: Mapping[str, Tensor], nested: int) -> Array:
    """The statistics of blocks in float64, by the documented formula."""
    absmax: Array = parameters[f"{NAME}.absmax"].numpy()
    if not nested:
        return absmax.astype(np.float64)
    said = json.loads(parameters[f"{NAME}.quant_state.bitsandbytes__nf4"].numpy().tobytes())
    outer = parameters[f"{NAME}.nested_absmax"].double().numpy()[np.arange(len(absmax)) // nested]
    table: Array = parameters[f"{NAME}.nested_quant_map"].double().numpy()
    found: Array = table[absmax] * outer + said["nested_offset"]
    return found


def test_int8_rounds_to_the_nearest_step_of_its_row(tmp_path: Path) -> None:
    tensors, stored = int8((6, 33), NAME.removesuffix(".weight"))
    weight = opened(tmp_path / "base", tensors)
    packed, decoded = in_pieces(weight, torch.from_numpy(stored), weight.parameters(Room()))
    assert torch.equal(packed.view(torch.int8).view(6, 33), torch.from_numpy(tensors[NAME]))
    assert torch.equal(decoded, torch.from_numpy(stored))
    values = torch.randn(6, 33, generator=torch.Generator().manual_seed(1))
    values[2] = 0
    parameters = new_parameters(weight, values)
    largest = parameters[f"{NAME.removesuffix('.weight')}.SCB"]
    assert torch.equal(largest, values.abs().amax(1))
    packed, decoded = in_pieces(weight, values, parameters)
    steps = np.round(values.double().numpy() * 127 / np.maximum(largest.double().numpy(), 1e-30)[:, None])
    assert np.array_equal(packed.view(torch.int8).view(6, 33).numpy(), steps)
    assert (decoded - values).abs().max() <= largest.max() / 127 / 2 * 1.0001
    assert not decoded[2].any()


def affine(tmp_path: Path, kind: str, block: tuple[int, int]) -> tuple[Requantizable, Array]:
    """A weight of torchao, and all values that an element of it can have before zero and scale."""
    numbers, stem = np.random.default_rng(0), NAME.replace(".weight", "._weight")
    blocks = (6 // block[0], 32 // block[1])
    bits = int(kind[3:]) if kind.startswith("int") else 8
    codes = np.arange(-(1 << bits - 1), 1 << bits - 1)
    values = torch.from_numpy(numbers.choice(codes, (6, 32)).astype(np.int8))
    tensors = {
        f"{stem}_qdata": values,
        f"{stem}_scale": torch.from_numpy(numbers.random(blocks, np.float32) / 40 + 0.01),
    }
    if kind == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        codes, tensors[f"{stem}_qdata"] = every[np.isfinite(every)], values.to(torch.float8_e4m3fn)
    else:
        tensors[f"{stem}_zero_point"] = torch.from_numpy(numbers.integers(-3, 4, blocks, np.int8))
    made = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}.get(kind, "IntxUnpackedToInt8Tensor")
    said = description(made, list(block), [name.removeprefix(f"{stem}_") for name in tensors], bits)
    folder = save_packed(tmp_path / "base", tensors, {"quant_method": "torchao"}, {NAME: said})
    weight = open_packed(folder).weights[NAME]
    assert isinstance(weight, Requantizable)
    return weight, codes


@pytest.mark.parametrize("kind", ["int8", "int4", "int1", "fp8"])
@pytest.mark.parametrize("block", [(1, 32), (1, 8), (3, 16)])
@pytest.mark.parametrize("new", [False, True])
def test_torchao_gets_the_nearest_value_that_its_block_has(
    tmp_path: Path, kind: str, block: tuple[int, int], new: bool
) -> None:
    weight, codes = affine(tmp_path, kind, block)
    own, stem = weight.parameters(Room()), NAME.replace(".weight", "._weight")
    assert torch.equal(in_pieces(weight, lines_of(weight), own)[1], lines_of(weight))
    values = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    values[:, -8:] = 0
    parameters = new_parameters(weight, values) if new else own
    _, decoded = in_pieces(weight, values, parameters)
    assert torch.equal(weight.encode(values, 0, parameters), in_pieces(weight, values, parameters)[0])

    def of_each(name: str) -> Array:
        """The entry of each element's block."""
        entries = parameters.get(f"{stem}_{name}", torch.zeros_like(own[f"{stem}_scale"])).double().numpy()
        return np.kron(entries, np.ones(block))[:, :, None]

    choices = (codes - of_each("zero_point")) * of_each("scale")
    errors = np.abs(values.double().numpy()[:, :, None] - choices).min(2)
    assert np.allclose(np.abs((values - decoded).double().numpy()), errors, rtol=1e-5, atol=1e-6)
    if new:
        largest = np.abs(values.numpy()).reshape(6 // block[0], block[0], 32 // block[1], block[1]).max((1, 3))
        wanted = largest / max(codes.max(), 1)
        assert np.allclose(parameters[f"{stem}_scale"].numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_itself_packs_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    library: Any = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    if kind == "int8":
        values = values.half().float()
        packed, largest, _ = library.int8_vectorwise_quant(values.half())
        tensors = {NAME: packed, f"{NAME.removesuffix('.weight')}.SCB": largest}
    else:
        packed, state = library.quantize_4bit(values, quant_type=kind)
        tensors = {NAME: packed, **{f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    weight = opened(tmp_path / "base", tensors)
    parameters = new_parameters(weight, values)
    for name, value in parameters.items():
        assert torch.equal(value, tensors[name])
    assert torch.equal(in_pieces(weight, values, parameters)[0], packed.flatten().view(torch.uint8))
