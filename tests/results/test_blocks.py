"""Bars of the blocks of image models: which block a module is in, and its part of the update."""

from __future__ import annotations

import pytest

from loratool.results.blocks import bars, block_of, is_of_images, shares


@pytest.mark.parametrize(
    ("target", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight", "IN04"),
        ("unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_q.weight", "OUT11"),
        ("unet_middle_block_1_transformer_blocks_0_attn1_to_q.weight", "MID"),
        ("unet.mid_block.attentions.0.proj_in.weight", "MID"),
        ("transformer.single_transformer_blocks.11.attn.to_q.weight", "S11"),
        ("unet_double_blocks_7_img_attn_qkv.weight", "D07"),
        ("te1_text_model_encoder_layers_0_mlp_fc1.weight", "te1"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight", "text_encoder_2"),
        ("unet_conv_in.weight", "IN00"),
        ("unet_time_embed_0.weight", "BASE"),
    ],
)
def test_a_module_is_in_the_block_that_block_weights_would_take_for_it(target: str, block: str) -> None:
    assert block_of(target) == block


def test_parts_are_of_the_sum_of_squares_in_the_order_of_the_model() -> None:
    """Norms 1, 3 and 4, 2 make 10, 16 and 4 of 30."""
    norms = {
        "unet.single_blocks.11.attentions.0.proj_in.weight": 4.0,
        "unet.single_blocks.10.proj_in.weight": 2.0,
        "unet.down_blocks.2.attentions.0.proj_in.weight": 1.0,
        "unet.down_blocks.2.attentions.0.proj_out.weight": 3.0,
    }
    found = shares(norms)
    assert list(found) == ["IN07", "S10", "S11"]
    assert [part for part, _ in found.values()] == pytest.approx([1 / 3, 4 / 30, 16 / 30])
    lines = bars(norms).splitlines()
    assert [line.count("█") for line in lines[1:]] == [20, 8, 32]
    assert lines[1].split()[:3] == ["33.3", "%", "IN07"]


def test_models_of_language_get_no_bars() -> None:
    assert not is_of_images(["model.layers.0.self_attn.q_proj.weight", "transformer.h.0.attn.c_attn.weight"])
    assert is_of_images(["unet_conv_in.weight"])
