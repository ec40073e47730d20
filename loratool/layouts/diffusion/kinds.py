"""Which models a name of a weight can belong to, in either layout, with dots or without.

A name may fit several; all names of a file together tell which models are left. Versions of Stable Diffusion have the
same names and differ in the width of what their text encoders give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from loratool.layouts.diffusion.words import DENOISER

SD1, SD2, SDXL = "Stable Diffusion 1", "Stable Diffusion 2", "SDXL"
UNETS = frozenset({SD1, SD2, SDXL})
LUMINA, LANGUAGE = "Lumina or Z-Image", "a language model or another one of Transformers"
WIDTHS: Mapping[int, str] = {768: SD1, 1024: SD2, 2048: SDXL}  # of the text that attention is given
# What a name begins with behind the word for the component, `.` for what divides its parts, and the models with such names.
PATTERNS: tuple[tuple[str, frozenset[str]], ...] = (
    (r"(?:down|up)_blocks.\d+.\d+.", frozenset({"Stable Cascade"})),
    (r"(?:input_blocks|output_blocks|middle_block|mid_block).|(?:down|up)_blocks.\d+.[a-z]", UNETS),
    (r"double_blocks.\d+.(?:img|txt)_(?:mlp.[02].|mod.lin.)|single_blocks.\d+.modulation.lin.", frozenset({"Flux"})),
    (r"double_blocks.\d+.(?:img|txt)_(?:mlp.fc[12]|mod.linear).|txt_in.individual", frozenset({"HunyuanVideo"})),
    (r"(?:double_blocks|single_blocks|single_transformer_blocks).\d+.", frozenset({"Flux", "HunyuanVideo"})),
    (r"joint_blocks.\d+.", frozenset({"SD3"})),
    (r"transformer_blocks.\d+.(?:img|txt)_m(?:lp|od).", frozenset({"Qwen-Image"})),
    (
        r"transformer_blocks.\d+.attn.(?:add_[qkv]_proj|to_add_out).",
        frozenset({"Flux", "HunyuanVideo", "SD3", "Qwen-Image"}),
    ),
    (r"blocks.\d+.(?:self_attn|cross_attn|ffn|attn[12]).", frozenset({"Wan"})),
    (r"(?:noise_refiner|context_refiner).\d+.|layers.\d+.(?:attention|attn).to_(?:[qkv]|out).", frozenset({LUMINA})),
    (r"layers.\d+.(?:attention.(?:qkv|out)|feed_forward.(?:w[123]|linear_[123])).", frozenset({LUMINA, LANGUAGE})),
)
TEXT_GIVEN = re.compile(r"attn2[._]to_[kv][._]")
# Names of language models, which are none of those above.
OF_LANGUAGE = re.compile(
    r"(?:^|.*\.)(?:layers?|h|blocks?)\.\d+\.(?:self_attn|self_attention|attention|attn|mlp|SelfAttention|DenseReluDense"
    r"|block_sparse_moe|mixer|linear_attn|layer\.\d+)\."
)
WORD = re.compile(rf"(?:model\.)?(?:{'|'.join(sorted(DENOISER, key=len, reverse=True))})[._]")


@cache
def patterns(flat: bool) -> tuple[tuple[re.Pattern[str], frozenset[str]], ...]:
    """What names begin with, and the models with such names; of names without dots where they are `flat`."""
    divider = "_" if flat else r"\."
    return tuple((re.compile(pattern.replace(".", divider)), models) for pattern, models in PATTERNS)


def models_of(shapes: Iterable[tuple[str, tuple[int, ...], bool]]) -> frozenset[str]:
    """The models that names may all belong to; none where they belong to no known one, or contradict each other.

    Args:
        shapes: (name, shape, whether the name is without dots) of weights.
    """
    left: frozenset[str] | None = None
    for name, shape, flat in shapes:
        found = models_with(name, patterns(flat))
        if found == UNETS and len(shape) > 1 and TEXT_GIVEN.search(name) and shape[1] in WIDTHS:
            found = frozenset({WIDTHS[shape[1]]})
        if found:
            left = found if left is None else left & found
    return left or frozenset()


def models_with(name: str, known: Iterable[tuple[re.Pattern[str], frozenset[str]]]) -> frozenset[str]:
    """The models that have such a name; `transformer_blocks` may begin with the word for a component, or not."""
    bare = name[match.end() :] if (match := WORD.match(name)) else name
    for pattern, models in known:
        if pattern.match(bare) or pattern.match(name):
            return models
    return frozenset()
