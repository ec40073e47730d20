"""Conversions that change names alone: bytes are copied and compared, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import numbers
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, LoratoolError
from loratool.files.tensor_writer import TensorFile

MODULES = {"double_blocks.0.img_attn.qkv": (24, 8), "single_blocks.37.linear2": (8, 40)}
CONVERT = """
import sys, loratool
report = loratool.convert(sys.argv[1], sys.argv[2], to="comfy")
back = loratool.convert(sys.argv[2], sys.argv[3], to="kohya")
loratool.rescale(sys.argv[1], sys.argv[4], scale=3)
print("torch" in sys.modules, report.text().count("byte for byte"), back.text().count("byte for byte"))
"""


def in_kohya(path: Path, model: str = "flux1") -> dict[str, Tensor]:
    """An adapter of Flux in bfloat16 as kohya's scripts save it, whose modules have a name of one kind in ComfyUI too."""
    tensors: dict[str, Tensor] = {}
    for n, (module, (out, inputs)) in enumerate(MODULES.items()):
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = numbers(2, inputs, seed=n).bfloat16()
        tensors[f"{name}.lora_up.weight"] = numbers(out, 2, seed=n + 9).bfloat16()
        tensors[f"{name}.alpha"] = torch.tensor(1.0, dtype=torch.bfloat16)
    save_file(tensors, path, {"ss_base_model_version": model})
    return tensors


def test_names_are_changed_without_torch_and_all_bytes_are_kept(tmp_path: Path) -> None:
    """There and back: the factors of kohya's file, under the names that ComfyUI's loader looks for, and its own again.

    Neither is torch needed for another strength, which is another α.
    """
    given, there, back, tripled = (tmp_path / f"{name}.safetensors" for name in ("given", "there", "back", "tripled"))
    before = in_kohya(given)
    words = [sys.executable, "-c", CONVERT, *map(str, (given, there, back, tripled))]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "1", "1"]
    for path, start, dot in ((there, "diffusion_model.", "."), (back, "lora_unet_", "_")):
        after = load_file(path)
        assert len(after) == len(before)
        for module in MODULES:
            own, theirs = f"lora_unet_{module.replace('.', '_')}", f"{start}{module.replace('.', dot)}"
            assert float(after[f"{theirs}.alpha"]) == 1.0
            for role in ("lora_down.weight", "lora_up.weight"):
                found, wanted = after[f"{theirs}.{role}"], before[f"{own}.{role}"]
                assert found.dtype == wanted.dtype
                assert torch.equal(found, wanted)
    for name, tensor in load_file(tripled).items():
        assert torch.equal(tensor, torch.tensor(3.0) if name.endswith(".alpha") else before[name]), name


def test_names_say_more_than_a_header_that_is_wrong(tmp_path: Path) -> None:
    """A header that names another architecture, or none that is known, hides no module."""
    for model in ("sd_v1", "sdxl_base_v1-0", "something"):
        in_kohya(tmp_path / "given.safetensors", model)
        loratool.convert(tmp_path / "given.safetensors", tmp_path / "out.safetensors", to="comfy", overwrite=True)
        found = {name.removesuffix(".alpha") for name in load_file(tmp_path / "out.safetensors") if "alpha" in name}
        assert found == {f"diffusion_model.{module}" for module in MODULES}


def test_values_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    tensors = in_kohya(tmp_path / "given.safetensors")
    name = "lora_unet_single_blocks_37_linear2.lora_up.weight"
    tensors[name][3, 1] = torch.nan
    save_file(tensors, tmp_path / "given.safetensors")
    with pytest.raises(InputError) as refusal:
        loratool.convert(tmp_path / "given.safetensors", tmp_path / "out.safetensors", to="comfy")
    assert [problem for problem in refusal.value.problems if name in problem]
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_byte_that_the_disk_changes_is_found_out(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest bit of one number: the proof reads what was really written, and nothing is published."""
    in_kohya(tmp_path / "given.safetensors")
    finish = TensorFile.finish

    def damaged(self: Any) -> None:
        finish(self)
        place = self.reserved + (4 if at == "first" else self.at - 2)  # behind the first α; the last number
        (byte,) = os.pread(self.descriptor, 1, place)
        os.pwrite(self.descriptor, bytes([byte ^ 1]), place)

    monkeypatch.setattr(TensorFile, "finish", damaged)
    with pytest.raises(LoratoolError, match="differs from what was read") as refusal:
        loratool.convert(tmp_path / "given.safetensors", tmp_path / "out.safetensors", to="comfy")
    assert refusal.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["given.safetensors"]
