"""The autoencoder of Stable Diffusion, SDXL, SD3 and Flux: four levels, with two layers in a block on the way down.

From `convert_ldm_vae_checkpoint` of diffusers 0.42. Its attention is made of convolutions in the original layout, and of
linear layers in diffusers'.
"""

from __future__ import annotations

from loratool.layouts.diffusion.rows import Family, Row, rows, within

LEVELS, LAYERS = 4, 2  # one layer more on the way up

SHORTCUT = ("nin_shortcut", "conv_shortcut")
RESNET = rows(("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), SHORTCUT)
ATTENTION = rows(
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


def middle(side: str) -> tuple[Row, ...]:
    """The middle block of the encoder or the decoder, and the norm at its end."""
    inner = f"{side}.mid_block"
    return (
        *within(f"{side}.mid.block_1", f"{inner}.resnets.0", RESNET),
        *within(f"{side}.mid.block_2", f"{inner}.resnets.1", RESNET),
        *within(f"{side}.mid.attn_1", f"{inner}.attentions.0", ATTENTION),
        *rows((f"{side}.norm_out", f"{side}.conv_norm_out")),
    )


def levels() -> tuple[Row, ...]:
    found: list[Row] = []
    for level in range(LEVELS):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{LEVELS - 1 - level}"  # the decoder counts back
        for layer in range(LAYERS):
            found += within(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", RESNET)
        for layer in range(LAYERS + 1):
            found += within(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", RESNET)
        found += rows(
            (f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"),
            (f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"),
        )
    return tuple(found)


VAE = Family(
    "vae",
    (*levels(), *middle("encoder"), *middle("decoder")),
    (
        ("encoder.mid.block_1.conv1",),
        ("decoder.mid.block_1.conv1",),
        ("encoder.mid_block.resnets.#.conv1",),
        ("decoder.mid_block.resnets.#.conv1",),
    ),
)
