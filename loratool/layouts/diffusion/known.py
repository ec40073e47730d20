"""Every module of known architectures in both layouts, for names that must be found without a base.

Depths and counts are those of the released models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from loratool.layouts.diffusion.flux import FLUX, HUNYUAN_VIDEO
from loratool.layouts.diffusion.rows import Family, Row
from loratool.layouts.diffusion.text_encoders import OPEN_CLIP, T5
from loratool.layouts.diffusion.transformers import LUMINA, QWEN_IMAGE, SD3, WAN
from loratool.layouts.diffusion.unet import LAYERS, UNET


@dataclass(frozen=True)
class Architecture:
    """A model whose modules can be listed."""

    family: Family
    counts: Mapping[str, int] = field(default_factory=dict)  # first component of an original name → its blocks
    depths: tuple[int, ...] = ()  # of a U-Net: transformer blocks at each level on the way down
    texts: tuple[str, ...] = ()  # its text encoders, in the order of diffusers


ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(UNET, depths=(1, 1, 1, 0), texts=("clip_l",)),
    "sd2": Architecture(UNET, depths=(1, 1, 1, 0), texts=("clip_h",)),
    "sdxl": Architecture(UNET, depths=(0, 2, 10), texts=("clip_l", "clip_g")),
    "flux": Architecture(FLUX, {"double_blocks": 19, "single_blocks": 38}, texts=("clip_l", "t5xxl")),
    "sd3": Architecture(SD3, {"joint_blocks": 24}, texts=("clip_l", "clip_g", "t5xxl")),
    "sd35-large": Architecture(SD3, {"joint_blocks": 38}, texts=("clip_l", "clip_g", "t5xxl")),
    "lumina2": Architecture(LUMINA, {"layers": 26, "noise_refiner": 2, "context_refiner": 2}),
    "z-image": Architecture(LUMINA, {"layers": 30, "noise_refiner": 2, "context_refiner": 2}),
    "wan-1.3b": Architecture(WAN, {"blocks": 30}),
    "wan-14b": Architecture(WAN, {"blocks": 40}),
    "hunyuan-video": Architecture(HUNYUAN_VIDEO, {"double_blocks": 20, "single_blocks": 40, "txt_in": 2}),
    "qwen-image": Architecture(QWEN_IMAGE, {"transformer_blocks": 60}),
}
# The text encoders with the number of their layers; what each layer has is named alike in every file but OpenCLIP's.
TEXTS: Mapping[str, Architecture] = {
    "clip_l": Architecture(OPEN_CLIP, {"transformer": 12}),
    "clip_h": Architecture(OPEN_CLIP, {"transformer": 23}),
    "clip_g": Architecture(OPEN_CLIP, {"transformer": 32}),
    "t5xxl": Architecture(T5, {"encoder": 24}),
}

ATTENTION = ("norm", "proj_in", "proj_out")  # of a spatial transformer
ATTENTION_BLOCK = (
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
# Modules with one name in both layouts.
SAME: Mapping[str, tuple[str, ...]] = {
    "t5": (
        *(f"encoder.block.#.layer.0.SelfAttention.{name}" for name in "qkvo"),
        "encoder.block.#.layer.0.layer_norm",
        *(f"encoder.block.#.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
        "encoder.block.#.layer.1.layer_norm",
        *("encoder.final_layer_norm", "shared"),
    ),
    "qwen-image": (
        *(f"transformer_blocks.#.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(f"transformer_blocks.#.attn.add_{name}_proj" for name in "qkv"),
        *(f"transformer_blocks.#.attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")),
        *(f"transformer_blocks.#.{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")),
        *(f"transformer_blocks.#.{stream}_mod.1" for stream in ("img", "txt")),
        *("img_in", "txt_in", "txt_norm", "proj_out", "norm_out.linear"),
        *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
    ),
    "lumina": (
        *(f"{stack}.#.feed_forward.w{number}" for stack in ("layers", "noise_refiner") for number in (1, 2, 3)),
        *(f"context_refiner.#.feed_forward.w{number}" for number in (1, 2, 3)),
        "x_embedder",
    ),
    "wan": ("patch_embedding",),
}
# What an open end of a row stands for, where it is not an attention.
ENDS: Mapping[str, tuple[str, ...]] = {
    "txt_in.c_embedder": ("linear_1", "linear_2"),
    "img_in": ("proj",),
    "cap_embedder": ("0", "1"),
    "final_layer": ("linear", "adaLN_modulation.1"),
    "x_embedder": ("",),
    "distilled_guidance_layer": ("in_proj", "out_proj"),
}


@cache
def links(name: str) -> tuple[Row, ...]:
    """The modules of an architecture, or of a text encoder: rows of its table with their numbers, each once.

    A fused module is one row with its parts. Some that a model does not have are among them.
    """
    known = {**ARCHITECTURES, **TEXTS}[name]
    same = tuple(Row(module, (module,)) for module in SAME.get(known.family.name, ()))
    found: list[Row] = []
    for row in (*known.family.rows, *same):
        for ended in with_ends(row, known):
            if "#" not in ended.original:
                found.append(ended)
            for number in range(known.counts.get(ended.original.partition(".")[0], 0) if "#" in ended.original else 0):
                parts = tuple(part.replace("#", str(number)) for part in ended.parts)
                found.append(ended.called(ended.original.replace("#", str(number)), parts))
    return tuple(found)


def with_ends(row: Row, known: Architecture) -> list[Row]:
    """The row with each module that its open end stands for; a U-Net's only where the model has them."""
    stem, (part, *_) = row.original.removesuffix(".*"), row.parts
    level = level_of(stem, known)
    if level is not None and level >= len(known.depths):
        return []
    if stem == row.original:
        return [] if known.depths and is_other_upsampler(stem, known) else [row]
    if level is not None:
        depth = known.depths[level] or (max(known.depths[-1], 1) if stem.startswith("middle") else 0)
        blocks = [f"transformer_blocks.{n}.{name}" for n in range(depth) for name in ATTENTION_BLOCK]
        ends = [*ATTENTION, *blocks] if depth else []
    else:
        ends = list(ENDS.get(stem, ()))
    start = part.removesuffix(".*")
    return [row.called(f"{stem}.{end}".rstrip("."), (f"{start}.{end}".rstrip("."),)) for end in ends]


def level_of(original: str, known: Architecture) -> int | None:
    """The level of a U-Net that a name is at, from the outside; None outside of its blocks."""
    first, _, rest = original.partition(".")
    number = rest.partition(".")[0]
    if not known.depths or first not in ("input_blocks", "middle_block", "output_blocks"):
        return None
    if first == "middle_block":
        return len(known.depths) - 1
    if first == "input_blocks":
        return max(int(number) - 1, 0) // (LAYERS + 1)
    above = int(number) // (LAYERS + 1)
    return len(known.depths) - 1 - above if above < len(known.depths) else len(known.depths)


def is_other_upsampler(original: str, known: Architecture) -> bool:
    """Whether it is the place of an upsampler that this model has in another, or one that it lacks."""
    level = level_of(original, known)
    if level is None or not original.endswith(".conv"):
        return False
    return level == 0 or original.endswith(".2.conv") != bool(known.depths[level])
