"""FP8, compressed-tensors, ModelOpt and MXFP4: decoded rows are the documented formula, bit for bit in float32.

Where the format's own library is there, they are what it makes of them, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_models import DEVICES, check_numpy, open_packed, room_on, save_packed
from quantised_models import FAMILIES, STACKS, Quantised
from torch import Tensor

from loratool.bases.weights import Room

CPU = torch.device("cpu")
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
LEFT = {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.ones(4, 8)}


def plain(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, made: Quantised, **tensors: Tensor) -> Path:
    path = save_packed(folder, {**made.tensors, **LEFT, **tensors}, made.config)
    for name, content in made.files.items():
        (path / name).write_text(json.dumps(content))
    return path


def check_rows(folder: Path, made: Quantised) -> None:
    """Rows from anywhere are those of the formula, on a GPU too where there is one, and nothing is wrong with scales."""
    found = open_packed(folder).weights
    assert found.keys() == made.values.keys()
    for name, wanted in made.values.items():
        weight, flat = found[name], wanted.reshape(len(wanted), -1)
        lines, matrix = wanted.reshape(-1, wanted.shape[-1]), weight.matrix(wanted.shape[-1])
        assert weight.shape == wanted.shape
        for device in DEVICES:
            room = room_on(device, flat.numel())
            for first, count in ((0, len(flat)), (0, 1), (1, 2), (len(flat) // 2, len(flat) - len(flat) // 2)):
                rows = weight.rows(first, count, device, torch.float32, room).cpu()
                assert torch.equal(rows, flat[first : first + count])
            for first, count in ((3, 1), (len(lines) // 3, len(lines) // 2), (len(lines) - 1, 1)):
                rows = matrix.rows(first, count, device, torch.float64, room).cpu()
                assert torch.equal(rows, lines[first : first + count].double())
            room.sources.close()
        assert weight.check(Room()) == ""
        check_numpy(weight, lines.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_decoded_by_the_formula(tmp_path: Path, family: str) -> None:
    """Blocks at the edges are cut, and rows end within a word, where the format allows it."""
    made = FAMILIES[family]({ATTENTION: plain(1, 38, 96), DOWN: plain(2, 34, 160) * 3})
    check_rows(save(tmp_path / "base", made), made)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_experts_are_decoded_by_the_formula(tmp_path: Path, family: str) -> None:
    name = EXPERTS if family.startswith("fp8 ") or "NVFP4" in family else f"{EXPERTS}.weight"
    name = f"{EXPERTS}.weight" if "fbgemm" in family else name
    made = FAMILIES[family]({name: plain(3, 3, 36, 64)})
    check_rows(save(tmp_path / "base", made), made)


@pytest.mark.parametrize("family", STACKS)
def test_experts_whose_rows_are_columns_of_the_file_are_decoded(tmp_path: Path, family: str) -> None:
    made = STACKS[family]({EXPERTS: plain(4, 3, 64, 26), EXPERTS.replace("gate_up", "down"): plain(5, 3, 96, 64)})
    check_rows(save(tmp_path / "base", made), made)


def decoded(folder: Path, name: str) -> Tensor:
    weight = open_packed(folder).weights[name]
    return weight.rows(0, weight.shape[0], CPU, torch.float32, Room()).view(weight.shape)


OF_COMPRESSED_TENSORS = [
    *("int4 groups", "int4 groups, zero points", "int8 packed, rows", "int3 groups", "int5 rows", "int6 groups"),
    *("int7 rows", "int8 (W8A8)", "int8, zero points", "float8 one scale", "float8 rows", "float8 blocks"),
    *("mxfp8", "nvfp4", "mxfp4"),
]


@pytest.mark.parametrize("family", OF_COMPRESSED_TENSORS)
def test_compressed_tensors_decodes_to_the_same(tmp_path: Path, family: str) -> None:
    """The library computes in the dtype of the scales, and rounds 4-bit floats and powers of two to bfloat16."""
    compressors = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    schemes = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    made = FAMILIES[family]({ATTENTION: plain(6, 38, 96)})
    group = {**made.config["config_groups"]["group_0"]}
    if family in ("mxfp8", "mxfp4"):
        group["weights"] = {**group["weights"], "scale_dtype": "torch.uint8"}
    compressor = compressors.get_value_from_registry(made.config["format"])
    parts = {name.removeprefix(ATTENTION.removesuffix("weight")): value for name, value in made.tensors.items()}
    half = parts["weight_scale"].dtype in (torch.bfloat16, torch.float16) or family in ("mxfp8", "mxfp4", "nvfp4")
    if parts["weight_scale"].dtype in (torch.bfloat16, torch.float16):  # in float32 as well
        wide = compressor.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, schemes(**group))
        assert torch.equal(decoded(save(tmp_path / "wide", made), ATTENTION), wide["weight"])
    theirs = compressor.decompress(parts, schemes(**group))["weight"]
    assert (theirs.dtype != torch.float32) == half
    assert torch.equal(decoded(save(tmp_path / "base", made), ATTENTION).to(theirs.dtype), theirs)


@pytest.mark.parametrize("family", ["fp8 blocks", "fp8 blocks, powers of two", "fp8 one scale"])
def test_transformers_decodes_fp8_to_the_same(tmp_path: Path, family: str) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    made = FAMILIES[family]({ATTENTION: plain(7, 32, 96)})
    operation = module.Fp8Dequantize(None)
    scales = made.tensors[f"{ATTENTION}_scale_inv"]
    theirs = operation._dequantize_one(made.tensors[ATTENTION], scales, torch.float32)
    assert torch.equal(decoded(save(tmp_path / "base", made), ATTENTION), theirs)


def test_transformers_decodes_experts_of_gpt_oss_to_the_same(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    made = STACKS["gpt-oss"]({EXPERTS: plain(8, 3, 64, 26)})
    parts = (made.tensors[f"{EXPERTS}_{part}"] for part in ("blocks", "scales"))
    theirs = module.convert_moe_packed_tensors(*parts, dtype=torch.float32)
    assert torch.equal(decoded(save(tmp_path / "base", made), EXPERTS), theirs)
