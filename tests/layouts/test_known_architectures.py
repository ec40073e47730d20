"""The modules of known architectures are listed without a base, and no two of them flatten to one name."""

from __future__ import annotations

import pytest

from loratool.adapters.adapter import Flattened
from loratool.layouts.diffusion.known import ARCHITECTURES, TEXTS, links

# (architecture, original, diffusers), from formats.md section 3 and the models' code
PAIRS = (
    ("sd15", "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("sd15", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    ("sd15", "output_blocks.8.2.conv", "up_blocks.2.upsamplers.0.conv"),
    ("sdxl", "input_blocks.4.1.transformer_blocks.1.attn2.to_k", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"),
    ("sdxl", "middle_block.1.transformer_blocks.9.ff.net.0.proj", "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"),
    ("flux", "double_blocks.18.img_mlp.0", "transformer_blocks.18.ff.net.0.proj"),
    ("flux", "final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("sd3", "joint_blocks.0.context_block.mlp.fc1", "transformer_blocks.0.ff_context.net.0.proj"),
    ("wan-14b", "blocks.39.cross_attn.k_img", "blocks.39.attn2.add_k_proj"),
    ("clip_g", "transformer.resblocks.31.mlp.c_fc", "text_model.encoder.layers.31.mlp.fc1"),
)  # fmt: skip
FUSED = (
    ("flux", "single_blocks.37.linear1", "attn.to_q attn.to_k attn.to_v proj_mlp", "hhhm"),
    ("flux", "double_blocks.0.txt_attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", ""),
    ("lumina2", "layers.25.attention.qkv", "attn.to_q attn.to_k attn.to_v", "hkk"),
)
# What every one of these has, counted from its config.
COUNTS = {
    "sd15": ("attn1.to_q", 16),
    "sdxl": ("attn1.to_q", 70),
    "flux": ("linear1", 2 * 38),
    "wan-14b": ("self_attn.q", 40),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *TEXTS])
def test_no_two_modules_of_a_known_architecture_flatten_to_one_name(name: str) -> None:
    for side in range(2):
        names = {module for row in links(name) for module in (row.parts if side else (row.original,))}
        assert len({Flattened.of(f"{module}.weight") for module in names}) == len(names)
        assert not any(mark in module for module in names for mark in "#*")


def test_modules_have_the_names_that_the_models_code_gives_them() -> None:
    for name, original, diffusers in PAIRS:
        assert any(row.original == original and row.parts == (diffusers,) for row in links(name)), original
    for name, original, parts, sizes in FUSED:
        rows = [row for row in links(name) if row.original == original and len(row.parts) == len(parts.split())]
        assert any(
            [part.partition(".")[2].partition(".")[2] for part in row.parts] == parts.split() and row.sizes == sizes
            for row in rows
        ), original


def test_as_many_modules_are_listed_as_a_model_has() -> None:
    for name, (ending, count) in COUNTS.items():
        assert sum(row.original.endswith(ending) for row in links(name)) == count, name
