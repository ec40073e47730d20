"""Blocks of image models as tools that weigh them name them, and the lists and presets that people pass around.

IN, MID and OUT of U-Nets, D of blocks with two streams, S of those with one, L of plain layers; IN and OUT without a
number are what comes before and after all blocks of a transformer, CLIP and T5 are text encoders. BASE is all else, and
those too where they have no factor of their own. Lists and presets are those of the LoRA Block Weight extension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

BASE, MID, CLIP, T5 = "BASE", "MID", "CLIP", "T5"
# What names of text encoders have, whatever their layers are called.
TEXT = (
    r"(?:^|[._])(?:te\d?|text_model|text_encoders?(?:_\d)?|cond_stage_model|conditioner|clip_[lg]|t5xxl|resblocks)[._]"
)
OF_T5 = re.compile(r"t5xxl|[._]block[._]\d+[._]layer[._]\d|[._]shared[._]")
OF_CLIP = re.compile(r"text_model|resblocks|clip_[lgh]")
AT = r"(?:^|[._])"
ALONE = r"^(?:model[._])?(?:(?:unet|transformer|diffusion_model|prior)[._])?"  # before a name at the top of a denoiser
# (pattern of a name with a dot or an underscore between its parts, kind, factors of its numbers, number of the first)
PATTERNS: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
    (AT + r"input_blocks[._](\d+)[._]", "IN", (1,), 0),
    (AT + r"conv_in[._]", "IN", (), 0),
    (AT + r"output_blocks[._](\d+)[._]", "OUT", (1,), 0),
    (AT + r"(?:middle_block|mid_block)[._]", MID, (), 0),
    (AT + r"down_blocks[._](\d+)[._](?:resnets|attentions)[._](\d+)[._]", "IN", (3, 1), 1),
    (AT + r"down_blocks[._](\d+)[._]downsamplers[._]", "IN", (3,), 3),
    (AT + r"up_blocks[._](\d+)[._](?:resnets|attentions)[._](\d+)[._]", "OUT", (3, 1), 0),
    (AT + r"up_blocks[._](\d+)[._]upsamplers[._]", "OUT", (3,), 2),
    (AT + r"single_(?:transformer_)?blocks[._](\d+)[._]", "S", (1,), 0),
    (AT + r"(?:double|joint|transformer)_blocks[._](\d+)[._]", "D", (1,), 0),
    (AT + r"(?:layers?|blocks?|h)[._](\d+)[._]", "L", (1,), 0),
    (
        ALONE
        + r"(?:(?:img|txt|time|vector|guidance)_in|(?:x|context|t|y)_embedder|time_(?:text|guidance)_embed|pos_embed)(?:[._]|$)",
        "IN",
        (),
        -1,
    ),
    (ALONE + r"(?:final_layer|norm_out|proj_out|head|scale_shift_table)(?:[._]|$)", "OUT", (), -1),
)
KINDS = ("IN", "OUT", "D", "S", "L")  # each with numbers


def numbered(kind: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{kind}{number:02d}" for number in numbers)


# The blocks that a list of so many numbers is for.
LISTS: Mapping[int, tuple[str, ...]] = {
    12: (BASE, *numbered("IN", 4, 5, 7, 8), MID, *numbered("OUT", *range(6))),  # SDXL, attention alone
    17: (BASE, *numbered("IN", 1, 2, 4, 5, 7, 8), MID, *numbered("OUT", *range(3, 12))),  # SD1.5, attention alone
    20: (BASE, *numbered("IN", *range(9)), MID, *numbered("OUT", *range(9))),
    26: (BASE, *numbered("IN", *range(12)), MID, *numbered("OUT", *range(12))),
    58: (BASE, *numbered("D", *range(19)), *numbered("S", *range(38))),  # Flux
    61: (CLIP, T5, "IN", *numbered("D", *range(19)), *numbered("S", *range(38)), "OUT"),  # Flux, of the extension
}
# The block whose factor counts for one that has none.
WIDER: Mapping[str, str] = {CLIP: BASE, T5: BASE, "IN": BASE, "OUT": BASE}
PRESETS: Mapping[str, str] = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}
TEXT_NAME = re.compile(TEXT)
NAMES = tuple((re.compile(pattern), kind, factors, first) for pattern, kind, factors, first in PATTERNS)


def block_of(name: str) -> str:
    """The block of a weight or module, by its name in any dialect; BASE where it is in none."""
    if TEXT_NAME.search(name):
        return T5 if OF_T5.search(name) else CLIP if OF_CLIP.search(name) else BASE
    for pattern, kind, factors, first in NAMES:
        if match := pattern.search(name):
            numbers = map(int, match.groups())
            return (
                kind
                if kind == MID or first < 0
                else f"{kind}{first + sum(map(math.prod, zip(factors, numbers, strict=True))):02d}"
            )
    return BASE
