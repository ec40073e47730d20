"""Bases that are packed in ways that loratool does not decode: they are named where an adapter would edit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed_models import save_packed
from peft_files import save_peft

import loratool

Array = NDArray[Any]

MODULE = "model.layers.0.self_attn.q_proj"
PLAIN = "model.layers.0.self_attn.o_proj"

# Kind → what config.json says, the packed tensor, others of the module, and what the kind is called.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Array], str]] = {
    "AQLM": (
        {"quantization_config": {"quant_method": "aqlm"}},
        "codes",
        {"codes": np.zeros((8, 1, 1), np.int16), "codebooks": np.zeros((1, 4, 1, 8), np.float16)},
        "AQLM",
    ),
    "VPTQ": (
        {"quantization_config": {"quant_method": "vptq"}},
        "indices",
        {"indices": np.zeros((1, 8, 4), np.int32), "centroids.weight": np.zeros((1, 8), np.float16)},
        "VPTQ",
    ),
    "EETQ": (
        {"quantization_config": {"quant_method": "eetq", "weights": "int8"}},
        "weight",
        {"weight": np.zeros((8, 8), np.int8), "weight_scales": np.ones(8, np.float16)},
        "EETQ",
    ),
    "BitNet": (
        {"quantization_config": {"quant_method": "bitnet"}},
        "weight",
        {"weight": np.zeros((2, 8), np.uint8), "weight_scale": np.ones(1, np.float32)},
        "BitNet",
    ),
    "MLX": (
        {"quantization": {"group_size": 64, "bits": 4}},
        "weight",
        {"weight": np.zeros((8, 1), np.uint32), "scales": np.ones((8, 1), np.float16)},
        "MLX",
    ),
    "quanto": (
        {},
        "weight._data._data",
        {"weight._data._data": np.zeros((4, 8), np.uint8)},
        "quanto's groups of 4 or 2",
    ),
    "torchao": (
        {},
        "_weight_qdata",
        {"_weight_qdata": np.zeros((1, 1, 32, 4), np.int32)},
        "torchao's Int4TilePackedTo4d",
    ),
}
INT4 = json.dumps({"_type": "Int4TilePackedTo4dTensor", "_data": {}, "_tensor_data_names": ["qdata", "scale_and_zero"]})


def save_adapter(folder: Path, module: str) -> Path:
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    named = {f"base_model.model.{module}.{name}.weight": value for name, value in factors.items()}
    return save_peft(folder, named, r=2, lora_alpha=2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_refused_by_the_name_of_the_kind_and_other_modules_can_be_edited(tmp_path: Path, kind: str) -> None:
    config, packed, tensors, title = KINDS[kind]
    named: dict[str, Any] = {f"{MODULE}.{name}": value for name, value in tensors.items()}
    named[f"{PLAIN}.weight"] = np.zeros((8, 8), np.float32)
    metadata = {f"{MODULE}.weight": INT4} if kind == "torchao" else None
    packing = config.get("quantization_config")
    others = {key: value for key, value in config.items() if key != "quantization_config"}
    base = save_packed(tmp_path / "base", named, packing, metadata, **others)
    with pytest.raises(loratool.InputError) as caught:
        loratool.merge(base, [save_adapter(tmp_path / "packed", MODULE)], tmp_path / "out", device="cpu")
    assert f"{MODULE}.{packed} is packed with {title}" in str(caught.value)
    assert "which loratool does not read; pass the unquantised model as BASE" in str(caught.value)
    assert not (tmp_path / "out").exists()
    loratool.merge(base, [save_adapter(tmp_path / "plain", PLAIN)], tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_what_is_not_read_cannot_be_dequantised_and_keeps_its_config(tmp_path: Path) -> None:
    """Of a base of two kinds the one that is read may become plain; the config stays for the other."""
    int8 = json.dumps(
        {"_type": "Int8Tensor", "_data": {"block_size": [1, 8]}, "_tensor_data_names": ["qdata", "scale"]}
    )
    tensors: dict[str, Array] = {
        f"{MODULE}._weight_qdata": np.zeros((1, 1, 32, 4), np.int32),
        f"{PLAIN}._weight_qdata": np.ones((8, 8), np.int8),
        f"{PLAIN}._weight_scale": np.ones((8, 1), np.float32),
    }
    metadata = {f"{MODULE}.weight": INT4, f"{PLAIN}.weight": int8}
    base = save_packed(tmp_path / "base", tensors, {"quant_method": "torchao"}, metadata)
    with pytest.raises(loratool.InputError) as caught:
        loratool.merge(base, [], tmp_path / "out", device="cpu", dequantize=True)
    assert f"{MODULE}._weight_qdata: is packed with torchao's Int4TilePackedTo4dTensor" in str(caught.value)
    assert not (tmp_path / "out").exists()
    loratool.merge(base, [save_adapter(tmp_path / "adapter", PLAIN)], tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "torchao", "modules_to_not_convert": ["lm_head", PLAIN]}
