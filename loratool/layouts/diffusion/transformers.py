"""Stable Diffusion 3, Lumina 2 and Z-Image, Wan, and Qwen-Image.

From `convert_sd3_transformer_checkpoint_to_diffusers`, `convert_lumina2_to_diffusers`,
`convert_z_image_transformer_checkpoint_to_diffusers` and `convert_wan_transformer_to_diffusers` of diffusers 0.42.
"""

from __future__ import annotations

from loratool.layouts.diffusion.rows import Family, Row, rows, within

TIME = rows(("mlp.0", "linear_1"), ("mlp.2", "linear_2"))

JOINT = (
    *rows(
        ("x_block.attn.qkv", "attn.to_q attn.to_k attn.to_v"),
        ("x_block.attn2.qkv", "attn2.to_q attn2.to_k attn2.to_v"),
        ("context_block.attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        ("x_block.attn.proj", "attn.to_out.0"),
        ("x_block.attn2.proj", "attn2.to_out.0"),
        ("context_block.attn.proj", "attn.to_add_out"),
        ("x_block.attn.ln_q", "attn.norm_q"),
        ("x_block.attn.ln_k", "attn.norm_k"),
        ("x_block.attn2.ln_q", "attn2.norm_q"),
        ("x_block.attn2.ln_k", "attn2.norm_k"),
        ("context_block.attn.ln_q", "attn.norm_added_q"),
        ("context_block.attn.ln_k", "attn.norm_added_k"),
        ("x_block.adaLN_modulation.1", "norm1.linear"),
        ("x_block.mlp.fc1", "ff.net.0.proj"),
        ("x_block.mlp.fc2", "ff.net.2"),
        ("context_block.mlp.fc1", "ff_context.net.0.proj"),
        ("context_block.mlp.fc2", "ff_context.net.2"),
    ),
    Row("context_block.adaLN_modulation.1", ("norm1_context.linear",), swapped=True),  # in the last block
)

SD3 = Family(
    "sd3",
    (
        *within("joint_blocks.#", "transformer_blocks.#", JOINT),
        *within("t_embedder", "time_text_embed.timestep_embedder", TIME),
        *within("y_embedder", "time_text_embed.text_embedder", TIME),
        *rows(
            ("pos_embed", "pos_embed.pos_embed"),
            ("x_embedder.proj", "pos_embed.proj"),
            ("context_embedder", "context_embedder"),
            ("final_layer.linear", "proj_out"),
        ),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    ),
    (("joint_blocks.#.x_block.attn.qkv",), ("transformer_blocks.#.attn.add_q_proj", "pos_embed.proj")),
)

LAYER = rows(
    ("attention.qkv", "attn.to_q attn.to_k attn.to_v", "hkk"),
    ("attention.out", "attn.to_out.0"),
    ("attention.q_norm", "attn.norm_q"),
    ("attention.k_norm", "attn.norm_k"),
    ("feed_forward.w1", "feed_forward.linear_1"),
    ("feed_forward.w2", "feed_forward.linear_2"),
    ("feed_forward.w3", "feed_forward.linear_3"),
    ("adaLN_modulation.1", "norm1.linear"),
    ("attention_norm2", "norm2"),
    ("ffn_norm1", "ffn_norm1"),
    ("ffn_norm2", "ffn_norm2"),
    # Z-Image
    ("attention.qkv", "attention.to_q attention.to_k attention.to_v"),
    ("attention.out", "attention.to_out.0"),
    ("attention.q_norm", "attention.norm_q"),
    ("attention.k_norm", "attention.norm_k"),
)
MODULATED = rows(("attention_norm1", "norm1.norm"))

LUMINA = Family(
    "lumina",
    (
        *within("layers.#", "layers.#", (*LAYER, *MODULATED)),
        *within("noise_refiner.#", "noise_refiner.#", (*LAYER, *MODULATED)),
        *within("context_refiner.#", "context_refiner.#", (*LAYER, *rows(("attention_norm1", "norm1")))),
        *within("t_embedder", "time_caption_embed.timestep_embedder", TIME),
        *rows(
            ("cap_embedder.*", "time_caption_embed.caption_embedder.*"),
            ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
            ("final_layer.linear", "norm_out.linear_2"),
            ("final_layer.*", "all_final_layer.2-1.*"),  # Z-Image
            ("x_embedder.*", "all_x_embedder.2-1.*"),
        ),
    ),
    (
        ("layers.#.attention.qkv", "layers.#.feed_forward.w1"),
        ("layers.#.attn.to_q", "layers.#.feed_forward.linear_1"),
        ("layers.#.attention.to_q", "layers.#.feed_forward.w1"),
    ),
)

CROSS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
WAN_ATTENTION = rows(
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)
WAN_BLOCK = (
    *(row for old, new in CROSS for row in within(old, new, WAN_ATTENTION)),
    *rows(
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("norm2", "norm3"),
        ("norm3", "norm2"),
        ("modulation", "scale_shift_table"),
        ("before_proj", "proj_in"),  # VACE
        ("after_proj", "proj_out"),
    ),
)

WAN = Family(
    "wan",
    (
        *within("blocks.#", "blocks.#", WAN_BLOCK),
        *within("vace_blocks.#", "vace_blocks.#", WAN_BLOCK),
        *rows(
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
            ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
            ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
            ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
            ("head.modulation", "scale_shift_table"),
            ("head.head", "proj_out"),
        ),
    ),
    (("blocks.#.self_attn.q", "blocks.#.cross_attn.q"), ("blocks.#.attn1.to_q", "blocks.#.ffn.net.#.proj")),
)

# The authors' names are those of diffusers.
QWEN_IMAGE = Family("qwen-image", (), (("transformer_blocks.#.attn.add_q_proj", "img_in", "txt_in"),))
