"""One flipped bit of a merged model is a single element that is off, in that tensor alone, however it was rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import header, header_bytes
from peft_files import named_by_peft, save_peft
from safetensors.torch import save_file

import loratool

SHAPES = {"down": (3, 5), "gate": (24, 40), "up": (17, 30), "plain": (8, 17), "empty": (6, 0)}
EDITED = ("down", "gate", "up")


def name_of(module: str) -> str:
    return f"model.layers.0.mlp.{module}_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, one of whose tensors is empty, and an adapter of an even rank for three of its weights."""
    folder, numbers = tmp_path_factory.mktemp("damage"), torch.Generator().manual_seed(1)
    (folder / "base").mkdir()
    base = {name_of(module): torch.randn(shape, generator=numbers) for module, shape in SHAPES.items()}
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    factors = {
        name_of(module).removesuffix(".weight"): (
            torch.randn((SHAPES[module][0], 2), generator=numbers) * 0.05,
            torch.randn((2, SHAPES[module][1]), generator=numbers),
        )
        for module in EDITED
    }
    save_peft(folder / "adapter", named_by_peft(factors), r=2, lora_alpha=2, target_modules=["gate_proj"])
    return folder


@pytest.fixture(scope="module", params=["nearest", "compensated", "stochastic"])
def merged(folder: Path, request: pytest.FixtureRequest) -> Path:
    out = folder / str(request.param)
    loratool.merge(folder / "base", [folder / "adapter"], out, dtype="bfloat16", rounding=request.param)
    return out


def verified(model: Path, folder: Path) -> loratool.Verification:
    return loratool.verify(model, folder / "base", [folder / "adapter"], dtype="bfloat16")


def test_an_empty_tensor_is_compared_though_it_is_converted(merged: Path, folder: Path) -> None:
    assert verified(merged, folder).verdict == "proven"


@pytest.mark.parametrize("bit", [15, 14], ids=["sign", "highest of the exponent"])
@pytest.mark.parametrize("module", ["down", "gate", "up", "plain"])
def test_a_flipped_bit_is_one_element_of_one_tensor(
    merged: Path, folder: Path, module: str, bit: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((merged / "config.json").read_bytes())
    file = merged / "model.safetensors"
    content, name = bytearray(file.read_bytes()), name_of(module)
    first, _ = header(file)[name]["data_offsets"]
    content[len(header_bytes(file)) + first + 2 * 7 + bit // 8] ^= 1 << bit % 8  # of the eighth element
    (tmp_path / "model.safetensors").write_bytes(content)
    found = verified(tmp_path, folder)
    assert found.tensors is not None
    assert [other for other, proof in found.tensors.items() if proof.status == "different"] == [name]
    wrong = [each for each in found.diagnoses if not each.passes]
    assert [(each.code, each.modules) for each in wrong] == [("elements-differ", (name.removesuffix(".weight"),))]
    assert wrong[0].numbers["elements"] == 1
