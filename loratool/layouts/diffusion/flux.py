"""FLUX.1 with its relatives Chroma and FLUX.2, and HunyuanVideo: blocks of two streams, then of one.

From `convert_flux_…`, `convert_chroma_…`, `convert_flux2_transformer_checkpoint_to_diffusers` and
`convert_hunyuan_video_transformer_to_diffusers` of diffusers 0.42.
"""

from __future__ import annotations

from loratool.layouts.diffusion.rows import Family, Row, rows, within

EMBEDDER = rows(("in_layer", "linear_1"), ("out_layer", "linear_2"))
PERCEPTRON = rows(("0", "net.0.proj"), ("2", "net.2"), ("0", "linear_in"), ("2", "linear_out"))
NORM_OUT = Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)

DOUBLE = (
    *rows(
        ("img_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
        ("txt_attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        ("img_attn.proj", "attn.to_out.0"),
        ("txt_attn.proj", "attn.to_add_out"),
        ("img_mod.lin", "norm1.linear"),
        ("txt_mod.lin", "norm1_context.linear"),
        ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
        ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
        ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
        ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    ),
    *within("img_mlp", "ff", PERCEPTRON),
    *within("txt_mlp", "ff_context", PERCEPTRON),
)
SINGLE = rows(
    ("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp", "hhhm"),
    ("linear1", "attn.to_qkv_mlp_proj"),  # FLUX.2
    ("linear2", "proj_out"),
    ("linear2", "attn.to_out"),  # FLUX.2
    ("modulation.lin", "norm.linear"),
    ("norm.query_norm.scale", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "attn.norm_k.weight"),
)
GUIDANCE = (  # Chroma
    *within("layers.#", "layers.#", EMBEDDER),
    *rows(("norms.#.scale", "norms.#.weight"), ("*", "*")),
)

FLUX = Family(
    "flux",
    (
        *within("double_blocks.#", "transformer_blocks.#", DOUBLE),
        *within("single_blocks.#", "single_transformer_blocks.#", SINGLE),
        *within("time_in", "time_text_embed.timestep_embedder", EMBEDDER),
        *within("vector_in", "time_text_embed.text_embedder", EMBEDDER),
        *within("guidance_in", "time_text_embed.guidance_embedder", EMBEDDER),
        *within("time_in", "time_guidance_embed.timestep_embedder", EMBEDDER),
        *within("guidance_in", "time_guidance_embed.guidance_embedder", EMBEDDER),
        *within("distilled_guidance_layer", "distilled_guidance_layer", GUIDANCE),
        *rows(
            ("img_in", "x_embedder"),
            ("txt_in", "context_embedder"),
            ("final_layer.linear", "proj_out"),
            ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
            ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
            ("single_stream_modulation.lin", "single_stream_modulation.linear"),
        ),
        NORM_OUT,
    ),
    (
        ("double_blocks.#.img_attn.qkv",),
        ("single_blocks.#.linear1",),
        ("single_transformer_blocks.#.proj_mlp",),
        ("single_transformer_blocks.#.attn.to_qkv_mlp_proj",),
        ("transformer_blocks.#.attn.add_q_proj", "x_embedder", "context_embedder"),
    ),
)

FEED_FORWARD = rows(("fc1", "net.0.proj"), ("fc2", "net.2"))
TIME = rows(("mlp.0", "linear_1"), ("mlp.2", "linear_2"))
HUNYUAN_DOUBLE = (
    *rows(
        ("img_attn_qkv", "attn.to_q attn.to_k attn.to_v"),
        ("txt_attn_qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        ("img_attn_proj", "attn.to_out.0"),
        ("txt_attn_proj", "attn.to_add_out"),
        ("img_attn_q_norm", "attn.norm_q"),
        ("img_attn_k_norm", "attn.norm_k"),
        ("txt_attn_q_norm", "attn.norm_added_q"),
        ("txt_attn_k_norm", "attn.norm_added_k"),
        ("img_mod.linear", "norm1.linear"),
        ("txt_mod.linear", "norm1_context.linear"),
    ),
    *within("img_mlp", "ff", FEED_FORWARD),
    *within("txt_mlp", "ff_context", FEED_FORWARD),
)
HUNYUAN_SINGLE = rows(
    ("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp", "hhhm"),
    ("linear2", "proj_out"),
    ("modulation.linear", "norm.linear"),
    ("q_norm", "attn.norm_q"),
    ("k_norm", "attn.norm_k"),
)
REFINER = (
    *rows(
        ("self_attn_qkv", "attn.to_q attn.to_k attn.to_v"),
        ("self_attn_proj", "attn.to_out.0"),
        ("adaLN_modulation.1", "norm_out.linear"),
        ("norm1", "norm1"),
        ("norm2", "norm2"),
    ),
    *within("mlp", "ff", FEED_FORWARD),
)

HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    (
        *within("double_blocks.#", "transformer_blocks.#", HUNYUAN_DOUBLE),
        *within("single_blocks.#", "single_transformer_blocks.#", HUNYUAN_SINGLE),
        *within("txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#", REFINER),
        *within("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", TIME),
        *within("time_in", "time_text_embed.timestep_embedder", TIME),
        *within("guidance_in", "time_text_embed.guidance_embedder", TIME),
        *within("vector_in", "time_text_embed.text_embedder", EMBEDDER),
        *rows(
            ("txt_in.input_embedder", "context_embedder.proj_in"),
            ("txt_in.c_embedder.*", "context_embedder.time_text_embed.text_embedder.*"),
            ("img_in.*", "x_embedder.*"),
            ("final_layer.linear", "proj_out"),
        ),
        NORM_OUT,
    ),
    (
        ("double_blocks.#.img_attn_qkv",),
        ("single_blocks.#.modulation.linear",),
        ("context_embedder.token_refiner.refiner_blocks.#.attn.to_q",),
    ),
)
