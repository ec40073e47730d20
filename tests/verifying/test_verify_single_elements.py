"""One flipped bit of a merged model is a single element that is off, in that tensor alone, however it was rounded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracle import header, header_bytes
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file, save_file

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


def flipped(model: Path, out: Path, module: str, bit: int, size: int) -> None:
    """The model with a bit of its eighth element of a tensor flipped; elements have so many bytes."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    first, _ = header(file)[name_of(module)]["data_offsets"]
    content[len(header_bytes(file)) + first + size * 7 + bit // 8] ^= 1 << bit % 8
    (out / "model.safetensors").write_bytes(content)


def damaged(found: loratool.Verification) -> list[str]:
    assert found.tensors is not None
    return [name for name, proof in found.tensors.items() if proof.status == "different"]


def test_damage_to_a_float32_tensor_is_no_other_rounding_of_the_rest(folder: Path, tmp_path: Path) -> None:
    """All ways to round leave float32 alike, damaged or not."""
    shutil.copytree(folder / "base", tmp_path / "base")
    base = load_file(folder / "base" / "model.safetensors")
    base[name_of("gate")] = base[name_of("gate")].bfloat16()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    loratool.merge(tmp_path / "base", [folder / "adapter"], tmp_path / "out")
    flipped(tmp_path / "out", tmp_path / "bad", "down", 30, 4)
    found = loratool.verify(tmp_path / "bad", tmp_path / "base", [folder / "adapter"])
    assert damaged(found) == [name_of("down")]
    assert found.rounding != "compensated"


def test_an_empty_tensor_is_compared_though_it_is_converted(merged: Path, folder: Path) -> None:
    assert verified(merged, folder).verdict == "proven"


@pytest.mark.parametrize("bit", [15, 14], ids=["sign", "highest of the exponent"])
@pytest.mark.parametrize("module", ["down", "gate", "up", "plain"])
def test_a_flipped_bit_is_one_element_of_one_tensor(
    merged: Path, folder: Path, module: str, bit: int, tmp_path: Path
) -> None:
    name = name_of(module)
    flipped(merged, tmp_path, module, bit, 2)
    found = verified(tmp_path, folder)
    assert damaged(found) == [name]
    wrong = [each for each in found.diagnoses if not each.passes]
    assert [(each.code, each.modules) for each in wrong] == [("elements-differ", (name.removesuffix(".weight"),))]
    assert wrong[0].numbers["elements"] == 1
