"""Components of image and video models: what they are called in adapters, and where single files have them."""

from __future__ import annotations

from collections.abc import Iterable

# What adapters call the model that removes noise. A pipeline may have a second one, which has its own name only.
DENOISER = ("unet", "transformer", "diffusion_model", "prior", "prior_unet")
SECOND_DENOISERS = ("transformer_2", "unet_2", "decoder")
# Layouts of names that such a word implies, where a name means one weight in each.
DIFFUSERS_WORDS = frozenset({"transformer"})

# What adapters call text encoders besides `text_encoder_N` and `teN` by their position, by what they are.
CLIP_L, CLIP_G, T5_WORDS = ("clip_l", "te1"), ("clip_g", "te2"), ("t5xxl", "t5", "te3")
TEXT_WORDS = frozenset(
    {*("te", "te1", "te2", "te3", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "prior_te")}
    | {*CLIP_L, *CLIP_G, *T5_WORDS, "clip_h"}
)

# Beginnings of names in files that hold several components, and what stands there; * for a name of the file's own.
STORED: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("cond_stage_model.transformer.", "clip_l"),
    ("cond_stage_model.model.", "clip_h"),
    ("conditioner.embedders.0.transformer.", "clip_l"),
    ("conditioner.embedders.0.model.", "clip_g"),  # the refiner of SDXL
    ("conditioner.embedders.1.model.", "clip_g"),
    ("text_encoders.*.transformer.", "*"),
    ("text_encoders.*.", "*"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
# Parts of weights' names of which each component has one: a model with none of them is no image or video model.
TELLING = frozenset(
    {
        *("diffusion_model", "cond_stage_model", "conditioner", "text_encoders", "first_stage_model", "vae"),
        *("input_blocks", "middle_block", "down_blocks", "mid_block", "mid", "attn1", "cross_attn", "feed_forward"),
        *("double_blocks", "single_blocks", "joint_blocks", "refiner_blocks"),
        *("transformer_blocks", "single_transformer_blocks"),
        *("text_model", "resblocks", "token_embedding", "SelfAttention"),
    }
)
# What a text encoder's names may begin with, or not: releases of transformers and tools differ.
OPTIONAL = ("text_model.", "model.language_model.", "language_model.model.", "language_model.", "model.")


def may_be_of_images(names: Iterable[str]) -> bool:
    """Whether weights can be those of an image or video model, or of a part of one; what they are is looked up then."""
    return any(not TELLING.isdisjoint(name.split(".")) for name in names)
