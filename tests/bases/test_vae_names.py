"""Adapters and differences of an autoencoder merge into both of its layouts, whichever they are named in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, ldm_vae, under, values
from safetensors.torch import load_file, save_file

import loratool

if TYPE_CHECKING:
    from pathlib import Path

H = WIDTH
# Name in diffusers → in LDM, from formats.md and diffusers' converter.
NAMES = {
    "decoder.up_blocks.0.resnets.1.conv1": "decoder.up.3.block.1.conv1",
    "decoder.up_blocks.2.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "encoder.down_blocks.1.resnets.0.conv_shortcut": "encoder.down.1.block.0.nin_shortcut",
    "encoder.mid_block.attentions.0.to_q": "encoder.mid.attn_1.q",
    "decoder.mid_block.resnets.0.conv1": "decoder.mid.block_1.conv1",
    "decoder.mid_block.resnets.1.conv2": "decoder.mid.block_2.conv2",
    "decoder.conv_in": "decoder.conv_in",
}


def shapes(of_diffusers: bool) -> dict[str, tuple[int, ...]]:
    """Those modules in a layout; attention is made of matrices in diffusers'."""
    ldm = ldm_vae()
    found: dict[str, tuple[int, ...]] = {}
    for new, old in NAMES.items():
        shape = ldm[f"{old}.weight"]
        found[f"{new if of_diffusers else old}.weight"] = shape[:2] if of_diffusers and "to_q" in new else shape
    return found


@pytest.mark.parametrize("base_of_diffusers", [False, True])
@pytest.mark.parametrize("adapter_of_diffusers", [False, True])
@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_names_of_both_layouts_mean_the_same_weights(
    tmp_path: Path, kind: str, adapter_of_diffusers: bool, base_of_diffusers: bool
) -> None:
    base = values(under("vae." if base_of_diffusers else "first_stage_model.", shapes(base_of_diffusers)))
    save_file(base, tmp_path / "base.safetensors")
    own = values(shapes(adapter_of_diffusers), 5)
    tensors: dict[str, torch.Tensor] = {}
    changes: list[torch.Tensor] = []
    for number, name in enumerate(own):
        module, weight = ("vae." if adapter_of_diffusers else "first_stage_model.") + name[: -len(".weight")], own[name]
        if kind == "diff":
            tensors[f"{module}.diff"] = weight
            changes.append(weight.double())
            continue
        down, up = torch.ones(1, *weight.shape[1:]) * (number + 1), torch.arange(1.0, H + 1).view(H, 1)
        tensors[f"{module}.lora_down.weight"] = down
        tensors[f"{module}.lora_up.weight"] = up.view(H, 1, *(1 for _ in weight.shape[2:]))
        changes.append((up.double() @ down.flatten(1).double()).view(weight.shape))
    save_file(tensors, tmp_path / "lora.safetensors")
    loratool.merge(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors", device="cpu"
    )
    merged = load_file(tmp_path / "out.safetensors")
    for number, name in enumerate(base):
        wanted = (base[name].double() + changes[number].view(base[name].shape)).float()
        torch.testing.assert_close(merged[name], wanted)
