"""The layers of Stable Diffusion 1 and 2 in the order in which torch walks through the modules of diffusers and transformers.

cloneofsimo's lora_diffusion numbers layers in this order: of every module of some classes, its linear layers and, where
it trained them too, its convolutions. A module's parts come in the order in which its constructor makes them. A U-Net
makes its middle block last, and the attention of a block before its ResNets. The feed-forward layers of a transformer
block come between its two attentions up to diffusers 0.14, and after them since 0.15. From `unet_2d_condition.py`,
`unet_2d_blocks.py`, `attention.py` and `resnet.py` of diffusers 0.7, 0.11, 0.14, 0.15 and 0.21, and transformers'
`modeling_clip.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LEVELS, LAYERS = 4, 2  # of the U-Net; the innermost level has ResNets alone
ATTENTION, GEGLU, RESNET, CLIP = frozenset({"CrossAttention", "Attention"}), "GEGLU", "ResnetBlock2D", "CLIPAttention"
UNET_CLASSES = ATTENTION | {GEGLU, RESNET}
# What a transformer block makes, one part after the other.
ORDERS = {"diffusers up to 0.14": ("attn1", "ff", "attn2"), "diffusers since 0.15": ("attn1", "attn2", "ff")}
Size = tuple[str, int]  # a width by a name of its own, and a factor
ANY: Size = ("", 0)  # the width of two tensors that are joined, of which nothing follows


@dataclass(frozen=True)
class Layer:
    """A layer of the walk."""

    name: str
    rows: Size
    columns: Size
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnetWalk:
    """One way through a U-Net."""

    classes: frozenset[str]
    order: tuple[str, ...]  # of the parts of a transformer block
    convolutions: bool  # whether they count, too

    def layers(self) -> Iterator[Layer]:
        last = LEVELS - 1
        for level in range(LEVELS):
            shortcuts = 1 if 0 < level < last else 0
            yield from self.block(f"down_blocks.{level}", level, LAYERS if level < last else 0, LAYERS, shortcuts)
        for step in range(LEVELS):
            each = LAYERS + 1
            yield from self.block(f"up_blocks.{step}", last - step, each if step else 0, each, each)
        yield from self.block("mid_block", last, 1, LAYERS, 0)

    def block(self, at: str, level: int, attentions: int, resnets: int, shortcuts: int) -> Iterator[Layer]:
        """The layers of a block at a level; `shortcuts` of its ResNets change the width."""
        width = f"level {level}"
        for number in range(attentions):
            yield from self.transformer(f"{at}.attentions.{number}.transformer_blocks.0", (width, 1))
        for number in range(resnets if RESNET in self.classes else 0):
            yield from self.resnet(f"{at}.resnets.{number}", (width, 1), number < shortcuts)

    def transformer(self, at: str, width: Size) -> Iterator[Layer]:
        for part in self.order:
            if part == "ff" and GEGLU in self.classes:
                yield Layer(f"{at}.ff.net.0.proj", (width[0], 8), width)
            elif part != "ff" and ATTENTION & self.classes:
                given = width if part == "attn1" else ("text", 1)
                yield from (
                    Layer(f"{at}.{part}.{name}", width, given if name in ("to_k", "to_v") else width)
                    for name in ("to_q", "to_k", "to_v", "to_out.0")
                )

    def resnet(self, at: str, width: Size, shortcut: bool) -> Iterator[Layer]:
        if self.convolutions:
            yield Layer(f"{at}.conv1", width, ANY, (3, 3))
        yield Layer(f"{at}.time_emb_proj", width, ("time", 1))
        if self.convolutions:
            yield Layer(f"{at}.conv2", width, width, (3, 3))
            yield from [Layer(f"{at}.conv_shortcut", width, ANY, (1, 1))] if shortcut else []


def clip(count: int) -> Iterator[Layer]:
    """The layers of so many attentions of a text encoder of CLIP."""
    for number in range(count):
        at = f"text_model.encoder.layers.{number}.self_attn"
        yield from (
            Layer(f"{at}.{name}", ("text", 1), ("text", 1)) for name in ("k_proj", "v_proj", "q_proj", "out_proj")
        )
