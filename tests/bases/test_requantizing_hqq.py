"""HQQ, and weights of Conv1D layers: values are packed again to the nearest ones that the base's own parameters give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_anew import in_pieces
from packed_bnb import FourBit
from packed_grouped import Grouped
from packed_hqq import WORDS, Hqq
from packed_models import open_packed, save_packed
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.bases.packed import Requantizable
from loratool.bases.weights import Room

Array = NDArray[Any]
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
SHAPE = (16, 32)
LORA = {"A": (1, 32), "B": (16, 1)}
CASES = [(packing, axis, group) for packing in WORDS for axis in (0, 1) for group in (16, 64)]


def opened(folder: Path, tensors: Mapping[str, Array], name: str = NAME) -> Requantizable:
    weight = open_packed(save_packed(folder, tensors, {"quant_method": "hqq"})).weights[name]
    assert isinstance(weight, Requantizable)
    return weight


def measured(weight: Requantizable, values: Tensor) -> Tensor:
    step = weight.together
    return torch.cat([weight.measure(values[first : first + step]) for first in range(0, len(values), step)])


def in_groups(values: Array, group: int, axis: int) -> Array:
    """A row for each group: values in a row are one, or each group has its turn."""
    return values.reshape(-1, group) if axis else values.reshape(group, -1).T


def unpacked(words: Array, packing: str, shape: tuple[int, int], group: int, axis: int) -> Array:
    """The unsigned values of each group, a row for each, out of words that hold the first values in their top bits."""
    bits, count, _, first = WORDS[packing]
    columns = group if axis else math.prod(shape) // group
    fields = [words.astype(np.int64).reshape(-1, columns) >> (first - bits * n) & (2**bits - 1) for n in range(count)]
    values = np.concatenate(fields)[: math.prod(shape) // columns]
    return values if axis else values.T


@pytest.mark.parametrize(("packing", "axis", "group"), CASES)
def test_values_of_the_base_keep_their_bytes(tmp_path: Path, packing: str, axis: int, group: int) -> None:
    packed = Hqq(SHAPE, packing, group, axis)
    weight = opened(tmp_path / "base", packed.tensors(MODULE))
    values = torch.from_numpy(packed.values())
    found, decoded = in_pieces(weight, values, weight.parameters(Room()))
    assert torch.equal(decoded, values)
    assert weight.laid_out(found).contiguous().numpy().tobytes() == packed.tensors(MODULE)[f"{MODULE}.W_q"].tobytes()


@pytest.mark.parametrize(("packing", "axis", "group"), CASES)
def test_new_parameters_span_each_group_and_each_value_becomes_the_nearest(
    tmp_path: Path, packing: str, axis: int, group: int
) -> None:
    tensors = Hqq(SHAPE, packing, group, axis).tensors(MODULE)
    weight = opened(tmp_path / "base", tensors)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02
    parameters = weight.new_parameters(measured(weight, values), weight.parameters(Room()))
    assert {n: (p.numpy().dtype, tuple(p.shape)) for n, p in parameters.items()} == {
        n: (v.dtype, v.shape) for n, v in tensors.items() if not n.endswith("W_q")
    }
    found, decoded = in_pieces(weight, values, parameters)
    on_disk = weight.laid_out(found).contiguous().view(torch.uint8).numpy()
    integers = unpacked(on_disk.view(tensors[f"{MODULE}.W_q"].dtype), packing, SHAPE, group, axis)
    scale, zero = (parameters[f"{MODULE}.{part}"].float().numpy().reshape(-1, 1) for part in ("scale", "zero"))
    wanted, grouped = in_groups(values.numpy(), group, axis), in_groups(decoded.numpy(), group, axis)
    assert np.array_equal(grouped, (integers.astype(np.float32) - zero) * scale)
    grid = (np.arange(2 ** WORDS[packing][0]) - zero) * scale  # (groups, all values that each has)
    nearest = np.abs(grid[:, None, :] - wanted[:, :, None]).min(2)
    assert np.all(np.abs(grouped - wanted) <= nearest + 1e-6 * scale)
    steps = 2 ** WORDS[packing][0] - 1
    assert np.allclose(scale[:, 0] * steps, np.ptp(wanted, axis=1), rtol=2e-3)


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_itself_packs_and_decodes_to_the_same_bits(tmp_path: Path, bits: float, axis: int) -> None:
    """Without its search for better zeros, which is another way than to round to the nearest value."""
    library: Any = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    config["weight_quant_params"]["optimize"] = False
    layer = library.HQQLinear(torch.nn.Linear(128, 48), config, compute_dtype=torch.float32, device="cpu")
    plain = torch.nn.Linear(128, 48)
    values = plain.weight.detach().clone()
    tensors = {f"{MODULE}.{key}": value.detach() for key, value in layer.state_dict().items()}
    weight = open_packed(save_packed(tmp_path / "base", tensors, None)).weights[NAME]
    assert isinstance(weight, Requantizable)
    parameters = weight.new_parameters(measured(weight, values), weight.parameters(Room()))
    found, decoded = in_pieces(weight, values, parameters)
    wanted = library.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    assert torch.allclose(parameters[f"{MODULE}.scale"], wanted.meta["scale"], rtol=1e-6)
    same = weight.laid_out(found).contiguous().view(torch.uint8) == wanted.W_q.data.contiguous().flatten().view(
        torch.uint8
    )
    assert same.float().mean() > 0.999  # it multiplies where a division is nearer
    assert torch.allclose(decoded, wanted.dequantize(), atol=float(wanted.meta["scale"].max()) * 1.001)


@pytest.mark.parametrize("kind", ["GPTQ", "nf4"])
def test_a_conv1d_is_turned_and_packed_anew(tmp_path: Path, kind: str) -> None:
    """Its rows are columns of what is packed: as many bytes as before, and what they decode to is nearer than before."""
    name = "h.0.attn.c_attn.weight"
    if kind == "GPTQ":
        tensors: Mapping[str, Array] = Grouped(16, 64, 4, 16).gptq(name.removesuffix(".weight"))
        config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    else:
        tensors = FourBit((16, 64), "nf4", 64, 0).tensors(name)
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = save_packed(tmp_path / "base", tensors, config, model_type="gpt2")
    up, down = torch.randn(64, 2, generator=torch.Generator().manual_seed(3)), torch.ones(2, 16)
    factors = {"base_model.model.h.0.attn.c_attn.lora_A.weight": up.T.contiguous()}
    factors["base_model.model.h.0.attn.c_attn.lora_B.weight"] = down.T.contiguous()
    save_peft(tmp_path / "adapter", factors, r=2, lora_alpha=2, fan_in_fan_out=True)
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", requantize=True, device="cpu")
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("base", "out"))
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    old, new = (open_packed(tmp_path / which).weights[name] for which in ("base", "out"))
    first, second = (each.rows(0, 64, torch.device("cpu"), torch.float64, Room()) for each in (old, new))
    change = up.double() @ down.double()
    assert torch.linalg.vector_norm(second - first - change) < 0.5 * torch.linalg.vector_norm(change)
    assert report.gain == pytest.approx(float(((second - first) * change).sum() / (change**2).sum()), rel=1e-6)


@pytest.mark.parametrize(("part", "bit"), [("scale", 13), ("scale", 0), ("zero", 9)])
def test_a_flipped_bit_of_a_scale_that_the_base_has_is_named(part: str, bit: int, tmp_path: Path) -> None:
    """Whether it costs a group all of its values, or next to nothing: the merge keeps the parameters of the base."""
    base = save_packed(tmp_path / "base", Hqq(SHAPE, "8bit_u8", 64, 0).tensors(MODULE), {"quant_method": "hqq"})
    factors = {
        f"base_model.model.{MODULE}.lora_{side}.weight": 0.2 * torch.ones(*shape) for side, shape in LORA.items()
    }
    save_peft(tmp_path / "adapter", factors, r=1, lora_alpha=1)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", requantize=True, accept_loss=True, device="cpu")
    assert loratool.verify(tmp_path / "out", base, tmp_path / "adapter", device="cpu").verdict == "proven"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    name = f"{MODULE}.{part}"
    assert torch.equal(tensors[name], before[name])
    tensors[name].view(torch.int16).view(-1)[5] ^= 1 << bit
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    found = loratool.verify(tmp_path / "out", base, tmp_path / "adapter", device="cpu")
    (told,) = (each for each in found.diagnoses if not each.passes)
    assert (told.code, told.numbers["parameters"]) == ("scales-differ", 1)
    assert name in told.text
