"""The layouts that components of image and video models may have."""

from __future__ import annotations

from loratool.layouts.diffusion.flux import FLUX, HUNYUAN_VIDEO
from loratool.layouts.diffusion.rows import Family
from loratool.layouts.diffusion.text_encoders import OPEN_CLIP, T5
from loratool.layouts.diffusion.transformers import LUMINA, QWEN_IMAGE, SD3, WAN
from loratool.layouts.diffusion.unet import UNET

DENOISERS: tuple[Family, ...] = (UNET, HUNYUAN_VIDEO, FLUX, SD3, LUMINA, WAN, QWEN_IMAGE)
TEXT_ENCODERS: tuple[Family, ...] = (OPEN_CLIP, T5)
