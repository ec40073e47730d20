"""Every alias of every layout means the rows that diffusers' own converters put there, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusion_models import (
    bfl_flux,
    hunyuan_video,
    ldm_unet,
    ldm_vae,
    lumina,
    numbered,
    open_clip,
    sd3,
    wan,
)

from loratool.adapters.adapter import Flattened
from loratool.bases.binding.aliases import aliases_of, family_of
from loratool.files.safefile import TensorInfo
from loratool.layouts.diffusion.components import DENOISERS, TEXT_ENCODERS
from loratool.layouts.diffusion.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusion_models import Shapes
    from torch import Tensor

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

LDM, OPEN_CLIP, FIRST_STAGE = "model.diffusion_model.", "conditioner.embedders.1.model.", "first_stage_model."


def unet(tensors: dict[str, Tensor], added: bool = False) -> dict[str, Tensor]:
    config = {"layers_per_block": 2, **({"addition_embed_type": "text_time"} if added else {})}
    converted: dict[str, Tensor] = single_file.convert_ldm_unet_checkpoint(
        {LDM + name: t for name, t in tensors.items()}, config
    )
    return converted


def clip_g(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = single_file.convert_open_clip_checkpoint(
        None, {OPEN_CLIP + n: t for n, t in tensors.items()}, OPEN_CLIP
    )
    return converted


def vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    converted: dict[str, Tensor] = single_file.convert_ldm_vae_checkpoint(
        {FIRST_STAGE + n: t for n, t in tensors.items()}, config
    )
    return converted


# The widths of Flux, HunyuanVideo and Lumina are written into their converters.
MODELS: dict[str, tuple[Shapes, Any]] = {
    "sd15": (ldm_unet((1, 1, 1, 0), matrix_ends=False, added=False), unet),
    "sdxl": (ldm_unet((0, 2, 2), matrix_ends=True, added=True), lambda tensors: unet(tensors, added=True)),
    "flux": (bfl_flux(3072, 4 * 3072, 128), single_file.convert_flux_transformer_checkpoint_to_diffusers),
    "sd3": (sd3(), single_file.convert_sd3_transformer_checkpoint_to_diffusers),
    "lumina": (lumina(2304, 768), single_file.convert_lumina2_to_diffusers),
    "z-image": (lumina(6, 6), single_file.convert_z_image_transformer_checkpoint_to_diffusers),
    "wan": (wan(), single_file.convert_wan_transformer_to_diffusers),
    "hunyuan-video": (hunyuan_video(3072, 4 * 3072), single_file.convert_hunyuan_video_transformer_to_diffusers),
    "clip_g": (open_clip(), clip_g),
    "vae": (ldm_vae(), vae),
}
FAMILIES = {"clip_g": TEXT_ENCODERS, "vae": (VAE,)}


def rows_of(tensor: Tensor) -> Tensor:
    """The number of every row."""
    return tensor.reshape(tensor.shape[0], -1)[:, 0]


@pytest.mark.parametrize("model", MODELS)
def test_aliases_are_the_rows_that_the_converter_puts_there(model: str) -> None:
    shapes, convert = MODELS[model]
    original = dict(numbered(shapes))
    converted = convert(dict(original))
    families = FAMILIES.get(model, DENOISERS)
    family = family_of(original, families)
    assert family is not None
    assert family_of(converted, families) is family
    for stored, wanted in ((original, converted), (converted, original)):
        infos = {name: TensorInfo(name, "F32", tuple(t.shape), 0, 0) for name, t in stored.items()}
        aliases = aliases_of(infos, family).names
        for name, tensor in wanted.items():
            compare(name, tensor, stored, aliases)
        names = {*stored, *aliases}
        assert len({Flattened.of(name) for name in names}) == len(names)


def compare(name: str, tensor: Tensor, stored: Mapping[str, Tensor], aliases: Mapping[str, Any]) -> None:
    if name not in aliases:
        assert torch.equal(rows_of(stored[name]), rows_of(tensor)), name
        return
    pieces = aliases[name]
    if pieces[0].transposed:
        assert torch.equal(stored[pieces[0].tensor].T, tensor)
        return
    parts = [stored[piece.tensor][piece.first_row : piece.first_row + piece.rows] for piece in pieces]
    assert sum(part.shape[0] for part in parts) == tensor.shape[0]
    assert torch.equal(torch.cat([rows_of(part) for part in parts]), rows_of(tensor)), name
