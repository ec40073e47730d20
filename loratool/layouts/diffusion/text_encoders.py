"""Text encoders: CLIP as OpenCLIP has it and as transformers does. All others have the names of transformers everywhere.

From `convert_open_clip_checkpoint` of diffusers 0.42.
"""

from __future__ import annotations

from loratool.layouts.diffusion.rows import Family, Row, rows, within

LAYER = rows(
    ("attn.in_proj_weight", "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"),
    ("attn.in_proj_bias", "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
)

OPEN_CLIP = Family(
    "clip",
    (
        *within("transformer.resblocks.#", "text_model.encoder.layers.#", LAYER),
        *rows(
            ("token_embedding", "text_model.embeddings.token_embedding"),
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("ln_final", "text_model.final_layer_norm"),
        ),
        Row("text_projection", ("text_projection.weight",), transposed=True),
    ),
    (
        ("transformer.resblocks.#.attn.out_proj",),
        ("text_model.encoder.layers.#.self_attn.q_proj",),
        ("encoder.layers.#.self_attn.q_proj", "embeddings.token_embedding"),  # transformers 5
    ),
)
T5 = Family("t5", (), (("encoder.block.#.layer.#.SelfAttention.q",),))
