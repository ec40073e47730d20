"""HQQ: decoded rows are the documented formula, and what does not fit together is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_hqq import WORDS, Hqq
from packed_models import check_rows, open_packed, save_packed

import loratool
from loratool.bases.weights import Room

Array = NDArray[Any]

LAYER = "model.layers.0."
MODULE = f"{LAYER}self_attn.q_proj"
NAME = f"{MODULE}.weight"
CONFIG = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}


@pytest.mark.parametrize("packing", WORDS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "group"), [((16, 24), 8), ((32, 12), 48), ((8, 16), 16)])
def test_values_are_unpacked_and_scaled_by_group(
    tmp_path: Path, packing: str, axis: int, shape: tuple[int, int], group: int
) -> None:
    """A row may lie in several groups, or a group in several rows; three bits leave the last words unfilled."""
    packed = Hqq(shape, packing, group, axis)
    if packing == "1bit_u8" and packed.grouped[0] % 8:
        pytest.skip("hqq packs no such shape")
    folder = save_packed(tmp_path / "base", packed.tensors(MODULE), CONFIG)
    check_rows(folder, NAME, packed.values())
    weight = open_packed(folder).weights[NAME]
    assert weight.scheme == f"HQQ {WORDS[packing][0]}-bit, groups of {group} along axis {axis}"
    assert {tensor.info.name for tensor in weight.tensors} == packed.tensors(MODULE).keys()


def test_words_may_be_stored_as_floats(tmp_path: Path) -> None:
    packed = Hqq((16, 24), "4bit_u8", 8, 1)
    tensors = {**packed.tensors(MODULE), f"{MODULE}.view_as_float": np.array(1, np.uint8)}
    tensors[f"{MODULE}.W_q"] = tensors[f"{MODULE}.W_q"].view(np.float16)
    check_rows(save_packed(tmp_path / "base", tensors, None), NAME, packed.values())


def listed(folder: Path, *plain: str) -> list[str]:
    (model,) = open_packed(folder).models
    names = [f"model.layers.{name}.weight" for name in plain]
    found: list[str] = model.left_plain(model.settings.places[0], names)["skip_modules"]
    return found


def test_plain_modules_are_listed_in_the_spellings_of_each_loader(tmp_path: Path) -> None:
    """transformers goes by names without numbers, vLLM by components: both can only tell all layers at once."""
    packed = Hqq((8, 16), "4bit_u8", 16, 1)
    layers = [f"{number}.self_attn.{name}_proj" for number in (0, 1) for name in "qkv"]
    tensors = {k: v for name in layers for k, v in packed.tensors(f"model.layers.{name}").items()}
    folder = save_packed(tmp_path / "base", tensors, CONFIG)
    assert listed(folder, "0.self_attn.q_proj") == ["lm_head", "model.layers.0.self_attn.q_proj"]
    every_query = ["self_attn.q_proj", "q_proj"]
    both = [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    assert listed(folder, "0.self_attn.q_proj", "1.self_attn.q_proj") == ["lm_head", *both, *every_query]
    assert "qkv_proj" not in listed(folder, *layers[:-1])
    assert "qkv_proj" in listed(folder, *layers)


def changed(key: str, value: Array | None) -> Callable[[dict[str, Array]], object]:
    def change(tensors: dict[str, Array]) -> object:
        return tensors.pop(f"{MODULE}.{key}") if value is None else tensors.update({f"{MODULE}.{key}": value})

    return change


MALFORMED: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "scale of another length": (
        changed("scale", np.ones((47, 1), np.float16)),
        f"{MODULE}.zero: must be F64 or F32 or F16 or BF16 [47, 1], but it is F16 [48, 1]",
    ),
    "scale missing": (changed("scale", None), f"{MODULE}.scale: must be F64 or F32 or F16 or BF16, but it is missing"),
    "wrong group size": (
        changed("group_size", np.array(16, np.int32)),
        f"{MODULE}.scale: must have a value for each of the groups of 16 of [16, 24], but it is F16 [48, 1]",
    ),
    "shape that does not fit": (
        changed("shape", np.array([16, 48], np.int64)),
        f"{MODULE}.scale: must have a value for each of the groups of 8 of [16, 48], but it is F16 [48, 1]",
    ),
    "words missing": (
        changed("W_q", np.zeros((23, 8), np.uint8)),
        f"{MODULE}.W_q: must be 192 bytes for [16, 24] in groups of 8, packed as 4bit_u8, but it is U8 [23, 8], 184 bytes",
    ),
    "both plain and packed": (
        changed("weight", np.zeros((16, 24), np.float32)),
        f"{NAME}: is there as well as {MODULE}.W_q, and only one of them may be",
    ),
    "unknown packing": (
        changed("packing", np.frombuffer(b"6bit_u8", np.uint8)),
        f"{MODULE}.packing: must be the text of one of 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8, but it is [54, 98",
    ),
    "no packing": (changed("packing", None), f"{MODULE}.packing: must be the text of one of 8bit_u8"),
    "no axis": (changed("axis", np.array(2, np.int32)), f"{MODULE}.axis: must be 0 or 1, but it is 2"),
    "no shape": (changed("shape", np.array([16], np.int64)), f"{MODULE}.shape: must hold two sizes, but it is [16]"),
    "packed scales": (
        changed("quant_scale", np.array(1, np.uint8)),
        f"{MODULE}.quant_scale: must be 0: scales that are packed themselves are not read, but it is 1",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, problem = MALFORMED[case]
    packed = Hqq((16, 24), "4bit_u8", 8, 1)
    tensors = packed.tensors(MODULE)
    change(tensors)
    other = packed.tensors(f"{LAYER}mlp.up_proj")
    other.pop(f"{LAYER}mlp.up_proj.axis")
    with pytest.raises(loratool.InputError) as caught:
        open_packed(save_packed(tmp_path / "base", {**tensors, **other}, CONFIG))
    assert problem in str(caught.value)
    assert f"{LAYER}mlp.up_proj.axis: must be 0 or 1, but it is missing" in str(caught.value)
    assert "HQQ weights that cannot be read; save the model with hqq again" in str(caught.value)


@pytest.mark.parametrize("part", ["scale", "zero"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_told(tmp_path: Path, part: str, wrong: float) -> None:
    tensors = Hqq((16, 24), "4bit_u8", 8, 1).tensors(MODULE)
    tensors[f"{MODULE}.{part}"][3] = wrong
    weight = open_packed(save_packed(tmp_path / "base", tensors, CONFIG)).weights[NAME]
    assert weight.check(Room()) == f"{MODULE}.{part}: 1 of 48 values are NaN or infinite"


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_itself_decodes_to_the_same_bits(tmp_path: Path, bits: float, axis: int) -> None:
    library: Any = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = library.HQQLinear(torch.nn.Linear(128, 48), config, compute_dtype=torch.float32, device="cpu")
    tensors = {f"{MODULE}.{key}": value.detach() for key, value in layer.state_dict().items()}
    check_rows(save_packed(tmp_path / "base", tensors, CONFIG), NAME, layer.dequantize().numpy())
