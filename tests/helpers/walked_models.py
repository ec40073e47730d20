"""Stable Diffusion's U-Net and text encoder as torch modules, made in the order of their constructors, and
lora_diffusion's walk through them: of each module of some classes, the layers in it.

Written down from diffusers 0.11 (`unet_2d_condition.py`, `unet_2d_blocks.py`, `attention.py`, `resnet.py`),
transformers' `modeling_clip.py` and `_find_modules_v2` of cloneofsimo/lora.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

WIDTHS, TEXT, TIME = (2, 4, 6, 6), 3, 5


class CrossAttention(nn.Module):
    def __init__(self, width: int, given: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(given, width, bias=False)
        self.to_v = nn.Linear(given, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout()])


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Dropout(), nn.Linear(4 * width, width)])


class Transformer(nn.Module):
    def __init__(self, width: int, order: Collection[str]) -> None:
        super().__init__()
        parts: dict[str, Callable[[], nn.Module]] = {
            "attn1": lambda: CrossAttention(width, width),
            "attn2": lambda: CrossAttention(width, TEXT),
            "ff": lambda: FeedForward(width),
        }
        block = nn.ModuleDict({name: parts[name]() for name in order})
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([block])


class ResnetBlock2D(nn.Module):
    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 3)
        self.time_emb_proj = nn.Linear(TIME, width)
        self.conv2 = nn.Conv2d(width, width, 3)
        if given != width:
            self.conv_shortcut = nn.Conv2d(given, width, 1)


class Block(nn.Module):
    def __init__(self, given: Collection[int], width: int, attentions: int, order: Collection[str]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Transformer(width, order) for _ in range(attentions)])
        self.resnets = nn.ModuleList([ResnetBlock2D(each, width) for each in given])


class UNet(nn.Module):
    def __init__(self, order: Collection[str] = ("attn1", "ff", "attn2")) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTHS[0], 3)
        self.down_blocks = nn.ModuleList([])
        self.up_blocks = nn.ModuleList([])
        skips = [WIDTHS[0]]
        last = WIDTHS[0]
        for level, width in enumerate(WIDTHS):
            self.down_blocks.append(Block([last, width], width, 2 if level < 3 else 0, order))
            skips += [width, width, *([width] if level < 3 else [])]
            last = width
        for step, width in enumerate(reversed(WIDTHS)):
            given = [(last if number == 0 else width) + skips.pop() for number in range(3)]
            self.up_blocks.append(Block(given, width, 3 if step else 0, order))
            last = width
        self.mid_block = Block([WIDTHS[-1], WIDTHS[-1]], WIDTHS[-1], 1, order)


class CLIPAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(TEXT, TEXT), nn.Linear(TEXT, TEXT)
        self.q_proj, self.out_proj = nn.Linear(TEXT, TEXT), nn.Linear(TEXT, TEXT)


class TextEncoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        each = [nn.ModuleDict({"self_attn": CLIPAttention()}) for _ in range(layers)]
        self.text_model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(each)})})


def walk(model: nn.Module, classes: Collection[str], convolutions: bool) -> Iterator[tuple[str, nn.Module]]:
    """The layers as lora_diffusion meets them, each with its name."""
    wanted = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    for at, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            yield from ((f"{at}.{name}", each) for name, each in ancestor.named_modules() if isinstance(each, wanted))
