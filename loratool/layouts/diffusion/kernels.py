"""Which layers of known models are convolutions, and of what size: LoHa and LoKr do not say so of what they change.

The layers before and after the attention of a U-Net are convolutions in Stable Diffusion 1, and linear since 2, so that
it takes the architecture to tell. Files have factors of either form for both, and tools load those of their model's alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

AT = r"(?:^|[._])"
# (end of a module's name in either layout, with dots or underscores, kernel; none of a linear layer)
PATTERNS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"resnets[._]\d+[._]conv[12]", (3, 3)),
    (r"(?:in_layers[._]2|out_layers[._]3)", (3, 3)),
    (r"(?:down|up)samplers[._]\d+[._]conv", (3, 3)),
    (r"input_blocks[._]\d+[._]0[._]op", (3, 3)),
    (r"output_blocks[._]\d+[._][12][._]conv", (3, 3)),
    (r"input_blocks[._]0[._]0", (3, 3)),
    (r"(?:unet|diffusion_model)[._](?:conv_in|conv_out|out[._]2)", (3, 3)),
    (r"(?:conv_shortcut|skip_connection)", (1, 1)),
    (r"(?:time_emb_proj|emb_layers[._]1)", ()),
    (r"(?:time_embed[._][02]|time_embedding[._]linear_[12]|add_embedding[._]linear_[12]|label_emb[._]0[._][02])", ()),
    (r"transformer_blocks[._]\d+[._](?:attn[12]?|ff|ff_context|norm1|norm1_context|(?:img|txt)_m(?:lp|od))[._].*", ()),
    (r"(?:double|single|single_transformer|joint)_blocks[._]\d+[._].*", ()),
    (
        r"(?:layers?|h|block|resblocks|blocks)[._]\d+[._](?:self_attn|cross_attn|mlp|ffn|feed_forward|attention)[._].*",
        (),
    ),
    (r"block[._]\d+[._]layer[._]\d+[._].*", ()),
)
PROJECTION = re.compile(
    rf"{AT}(?:attentions[._]\d+|(?:input|output)_blocks[._]\d+[._]1|middle_block[._]1)[._]proj_(?:in|out)$"
)
PROJECTIONS: Mapping[str, tuple[int, ...]] = {"sd15": (1, 1), "sd2": (), "sdxl": ()}  # by architecture: their kernel
KNOWN = tuple((re.compile(rf"{AT}{pattern}$"), kernel) for pattern, kernel in PATTERNS)


def kernel_of(module: str) -> tuple[int, ...] | None:
    """The kernel of a module by its name, nothing for a linear layer; None where the name does not tell."""
    return next((kernel for pattern, kernel in KNOWN if pattern.search(module)), None)


def is_projection(module: str) -> bool:
    """Whether a module is one of those before and after the attention of a U-Net."""
    return PROJECTION.search(module) is not None
