"""A model is looked up among image and video models only where its names can be theirs, and never missed for that."""

from __future__ import annotations

import pytest
from diffusion_models import (
    bfl_flux,
    clip,
    hunyuan_video,
    ldm_vae,
    lumina,
    open_clip,
    sd3,
    sd15_file,
    sdxl_file,
    t5,
    wan,
)

from loratool.layouts.diffusion.components import DENOISERS, TEXT_ENCODERS
from loratool.layouts.diffusion.vae import VAE
from loratool.layouts.diffusion.words import STORED, may_be_of_images


@pytest.mark.parametrize("family", [*DENOISERS, *TEXT_ENCODERS, VAE], ids=lambda family: family.name)
def test_whatever_marks_a_family_is_looked_up(family: object) -> None:
    assert isinstance(family, type(VAE))
    for mark in family.marks:
        assert may_be_of_images(f"{module.replace('#', '0')}.weight" for module in mark), mark


@pytest.mark.parametrize("prefix", [prefix for prefix, _ in STORED])
def test_whatever_stands_under_the_prefix_of_a_component_is_looked_up(prefix: str) -> None:
    assert may_be_of_images([f"{prefix.replace('*', 'other')}unknown.0.weight"])


def test_models_as_their_authors_write_them_are_looked_up() -> None:
    models = (bfl_flux, clip, hunyuan_video, ldm_vae, lumina, open_clip, sd3, sd15_file, sdxl_file, t5, wan)
    assert [model.__name__ for model in models if not may_be_of_images(model())] == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "h.11.attn.c_attn.weight",
        "lm_head.weight",
    ],
)
def test_language_models_are_not(name: str) -> None:
    assert not may_be_of_images([name])
