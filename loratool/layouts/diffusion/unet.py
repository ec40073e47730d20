"""The U-Net of Stable Diffusion 1, 2 and XL, all of which have two layers in a block.

From `convert_ldm_unet_checkpoint` of diffusers 0.42.
"""

from __future__ import annotations

from loratool.layouts.diffusion.rows import Family, Row, rows, within

LEVELS = 4  # the most there are; XL has 3
LAYERS = 2  # in a block on the way down; one more on the way up

RESNET = rows(
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
ATTENTION = rows(("*", "*"))  # both layouts name what is in it alike


def blocks() -> tuple[Row, ...]:
    found: list[Row] = []
    for level in range(LEVELS):
        down, up = 1 + level * (LAYERS + 1), level * (LAYERS + 1)
        for layer in range(LAYERS):
            found += within(f"input_blocks.{down + layer}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            found += within(f"input_blocks.{down + layer}.1", f"down_blocks.{level}.attentions.{layer}", ATTENTION)
        found += rows((f"input_blocks.{down + LAYERS}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        for layer in range(LAYERS + 1):
            found += within(f"output_blocks.{up + layer}.0", f"up_blocks.{level}.resnets.{layer}", RESNET)
            found += within(f"output_blocks.{up + layer}.1", f"up_blocks.{level}.attentions.{layer}", ATTENTION)
        for at in (1, 2):  # behind the attention, where there is one
            found += rows((f"output_blocks.{up + LAYERS}.{at}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return tuple(found)


UNET = Family(
    "unet",
    (
        *blocks(),
        *within("middle_block.0", "mid_block.resnets.0", RESNET),
        *within("middle_block.1", "mid_block.attentions.0", ATTENTION),
        *within("middle_block.2", "mid_block.resnets.1", RESNET),
        *rows(
            ("input_blocks.0.0", "conv_in"),
            ("out.0", "conv_norm_out"),
            ("out.2", "conv_out"),
            ("time_embed.0", "time_embedding.linear_1"),
            ("time_embed.2", "time_embedding.linear_2"),
            ("label_emb.0.0", "add_embedding.linear_1"),
            ("label_emb.0.2", "add_embedding.linear_2"),
            ("label_emb.0.0", "class_embedding.linear_1"),
            ("label_emb.0.2", "class_embedding.linear_2"),
        ),
    ),
    (
        ("input_blocks.#.#.in_layers.#",),
        ("down_blocks.#.resnets.#.conv1",),
        ("middle_block.#.in_layers.#",),
        ("input_blocks.#.#.transformer_blocks.#.attn1.to_q",),
        ("down_blocks.#.attentions.#.transformer_blocks.#.attn1.to_q",),
    ),
)
