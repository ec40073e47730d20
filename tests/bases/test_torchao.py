"""torchao's tensors of 8 bits: decoded rows are the documented formula, and what cannot be read is refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_affine import description
from packed_models import check_rows, open_packed, save_packed

import loratool
from loratool.bases.weights import Room

Array = NDArray[Any]
Tensors = dict[str, "Array | torch.Tensor"]

LAYER = "model.layers.0."
NAME = f"{LAYER}self_attn.q_proj.weight"
STEM = f"{LAYER}self_attn.q_proj._weight"
EXPERTS = f"{LAYER}mlp.experts.gate_up_proj"
CONFIG: dict[str, Any] = {"quant_method": "torchao", "quant_type": {"default": {}}, "modules_to_not_convert": None}


def packed(
    kind: str, shape: tuple[int, ...], block: tuple[int, ...], name: str
) -> tuple[Tensors, dict[str, str], Array]:
    """Random tensors of a weight, the metadata that describes it, and its values, element by element."""
    numbers = np.random.default_rng(0)
    blocks = tuple(size // each for size, each in zip(shape, block, strict=True))
    values: Array = numbers.integers(-8, 8, shape, np.int8)
    scale = numbers.random(blocks, np.float32) + np.float32(0.1)
    zero = numbers.integers(-3, 4, blocks, np.int8)
    module, _, parameter = name.rpartition(".")
    stem = f"{module}._{parameter}_"
    tensors: Tensors = {f"{stem}qdata": values, f"{stem}scale": scale}
    if kind == "Float8Tensor":
        tensors[f"{stem}qdata"] = torch.from_numpy(values).to(torch.float8_e4m3fn)  # which holds these as they are
        zero = np.zeros(blocks, np.int8)
    else:
        tensors[f"{stem}zero_point"] = zero
    decoded = np.empty(shape, np.float32)
    for at in itertools.product(*map(range, shape)):
        of_block = tuple(index // each for index, each in zip(at, block, strict=True))
        decoded[at] = (np.float32(values[at]) - np.float32(zero[of_block])) * scale[of_block]
    parts = [key.removeprefix(stem) for key in tensors]
    metadata = {"format": "pt", "tensor_names": json.dumps([name, "model.norm.weight"])}
    metadata |= {name: description(kind, list(block), parts), "model.norm.weight": '{"_type": "Tensor"}'}
    return tensors, metadata, decoded


@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"])
@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [
        (NAME, (6, 32), (1, 32)),
        (NAME, (6, 32), (1, 8)),
        (NAME, (6, 32), (6, 32)),
        (NAME, (6, 32), (3, 16)),
        (EXPERTS, (4, 6, 8), (1, 1, 8)),
        (EXPERTS, (4, 6, 8), (2, 3, 4)),
    ],
)
def test_values_are_scaled_by_block(
    tmp_path: Path, kind: str, name: str, shape: tuple[int, ...], block: tuple[int, ...]
) -> None:
    tensors, metadata, wanted = packed(kind, shape, block, name)
    folder = save_packed(tmp_path / "base", tensors, CONFIG, metadata)
    check_rows(folder, name, wanted)
    base = open_packed(folder)
    assert base.weights[name].scheme == f"torchao {kind}, blocks of {' x '.join(map(str, block))}"
    assert {tensor.info.name for tensor in base.weights[name].tensors} == tensors.keys()


def test_a_plain_module_is_described_as_a_tensor_in_every_file(tmp_path: Path) -> None:
    tensors, metadata, _ = packed("Int8Tensor", (6, 32), (1, 32), NAME)
    base = open_packed(save_packed(tmp_path / "base", tensors, CONFIG, metadata))
    said = base.metadata(metadata, [NAME])
    assert said == {**metadata, NAME: '{"_type": "Tensor"}'}
    assert base.metadata(metadata, []) == metadata


@pytest.mark.parametrize(("given", "wanted"), [(None, ["lm_head"]), (["lm_head", "x"], ["lm_head", "x"]), ([], [])])
def test_plain_modules_are_listed(tmp_path: Path, given: list[str] | None, wanted: list[str]) -> None:
    tensors, metadata, _ = packed("Int8Tensor", (6, 32), (1, 32), NAME)
    config = {**CONFIG, "modules_to_not_convert": given}
    (model,) = open_packed(save_packed(tmp_path / "base", tensors, config, metadata)).models
    said = model.left_plain(model.settings.places[0], [NAME])
    module = NAME.removesuffix(".weight")
    listed = [*wanted, module, f"{LAYER}self_attn.qkv_proj"]
    assert said == {**config, "modules_to_not_convert": listed}


def test_classes_that_are_laid_out_for_a_gpu_are_found_and_not_decoded(tmp_path: Path) -> None:
    tensors: Tensors = {f"{STEM}_qdata": np.zeros((1, 4, 32, 4), np.int32), f"{STEM}_scale_and_zero": np.zeros((4, 2))}
    said = description("Int4TilePackedTo4dTensor", [1, 32], ["qdata", "scale_and_zero"])
    other, metadata, wanted = packed("Int8Tensor", (6, 32), (1, 32), f"{LAYER}mlp.up_proj.weight")
    folder = save_packed(tmp_path / "base", {**tensors, **other}, CONFIG, {**metadata, NAME: said})
    base = open_packed(folder)
    assert base.unread == dict.fromkeys(tensors, "torchao's Int4TilePackedTo4dTensor")
    check_rows(folder, f"{LAYER}mlp.up_proj.weight", wanted)


Change = Callable[[Tensors, dict[str, str]], object]
MALFORMED: dict[str, tuple[Change, str]] = {
    "scale of another length": (
        lambda t, _: t.update({f"{STEM}_scale": np.ones((6, 3), np.float32)}),
        f"{STEM}_scale: must be F64 or F32 or F16 or BF16 [6, 4] for blocks of [1, 8], but it is F32 [6, 3]",
    ),
    "scale missing": (lambda t, _: t.pop(f"{STEM}_scale"), f"{STEM}_scale: must be F64 or F32 or F16 or BF16 [6, 4]"),
    "wrong group size": (
        lambda _, m: m.update({NAME: description("Int8Tensor", [1, 16], ["qdata", "scale", "zero_point"])}),
        f"{STEM}_scale: must be F64 or F32 or F16 or BF16 [6, 2] for blocks of [1, 16], but it is F32 [6, 4]",
    ),
    "blocks that do not divide": (
        lambda _, m: m.update({NAME: description("Int8Tensor", [1, 12], ["qdata", "scale", "zero_point"])}),
        f"{NAME}: block_size must have a divisor of each size of [6, 32], but it is [1, 12]",
    ),
    "no blocks": (
        lambda _, m: m.update({NAME: description("Int8Tensor", None, ["qdata", "scale", "zero_point"])}),
        f"{NAME}: block_size must have a divisor of each size of [6, 32], but it is None",
    ),
    "zeros of another length": (
        lambda t, _: t.update({f"{STEM}_zero_point": np.ones((6, 1), np.int8)}),
        f"{STEM}_zero_point: must be I8 or F64 or F32 or F16 or BF16 [6, 4] for blocks of [1, 8], but it is I8 [6, 1]",
    ),
    "another class": (
        lambda _, m: m.update({NAME: description("Float8Tensor", [1, 8], ["qdata", "scale"])}),
        f"{STEM}_qdata: must be F8_E4M3 or F8_E5M2 for Float8Tensor, but it is I8 [6, 32]",
    ),
    "values missing": (lambda t, _: t.pop(f"{STEM}_qdata"), f"{STEM}_qdata: must be I8 for Int8Tensor, but it is miss"),
    "both plain and packed": (
        lambda t, _: t.update({NAME: np.zeros((6, 32), np.float32)}),
        f"{NAME}: is there as well as {STEM}_qdata, and only one of them may be",
    ),
    "not described": (
        lambda _, m: m.pop(NAME),
        f"{STEM}_qdata: the metadata of the file does not say how it is packed, so no loader can read it",
    ),
    "description broken": (
        lambda _, m: m.update({NAME: '{"_type"'}),
        f"{STEM}_qdata: the metadata of the file does not",
    ),
    "named as by old releases": (
        lambda t, _: t.update({f"{NAME}:qdata": t.pop(f"{STEM}_qdata")}),
        f"{NAME}:qdata: has a name from torchao 0.14 or older; load the model with that release and save it with a "
        "newer one",
    ),
    "scaled inputs": (
        lambda t, _: t.update({f"{STEM}_act_pre_scale": np.ones(32, np.float32)}),
        f"{STEM}_act_pre_scale: scales the layer's inputs, which is not read",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, problem = MALFORMED[case]
    tensors, metadata, _ = packed("Int8Tensor", (6, 32), (1, 8), NAME)
    other, more, _ = packed("Int8Tensor", (6, 32), (1, 8), f"{LAYER}mlp.up_proj.weight")
    other.pop(f"{LAYER}mlp.up_proj._weight_scale")
    change(tensors, metadata)
    with pytest.raises(loratool.InputError) as caught:
        open_packed(save_packed(tmp_path / "base", {**tensors, **other}, CONFIG, {**more, **metadata}))
    assert problem in str(caught.value)
    assert f"{LAYER}mlp.up_proj._weight_scale: must be F64 or F32 or F16 or BF16 [6, 4]" in str(caught.value)
    assert "torchao weights that cannot be read; pass the unquantised model as BASE" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "problem"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (-1, "negative"), (0, "zero")]
)
def test_scales_that_no_quantiser_writes_are_told(tmp_path: Path, wrong: float, problem: str) -> None:
    tensors, metadata, _ = packed("Int8Tensor", (6, 32), (1, 8), NAME)
    scale: Any = tensors[f"{STEM}_scale"]
    scale[2, 1] = wrong
    weight = open_packed(save_packed(tmp_path / "base", tensors, CONFIG, metadata)).weights[NAME]
    assert weight.check(Room()) == f"{STEM}_scale: 1 of 24 values are {problem}"


@pytest.mark.parametrize("kind", ["fp8 by row", "fp8 whole", "fp8 by block", "int8 by row", "int8 by group"])
def test_torchao_itself_decodes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    library: Any = pytest.importorskip("torchao.quantization")
    saving: Any = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    form, _, how = kind.partition(" ")
    granularity = {
        "by row": lambda: library.PerRow(),
        "whole": lambda: library.PerTensor(),
        "by block": lambda: library.granularity.PerBlock([8, 32]),
        "by group": lambda: library.PerGroup(16),
    }[how]()
    made = library.Float8Tensor if form == "fp8" else library.Int8Tensor
    stored = made.from_hp(weight, granularity=granularity)
    tensors, metadata = saving.flatten_tensor_state_dict({NAME: stored})
    check_rows(
        save_packed(tmp_path / "base", tensors, CONFIG, metadata), NAME, stored.dequantize(torch.float32).numpy()
    )
