"""The dialects by how names of modules begin, in the order in which they are tried; facts of 2026.

A module is the name of a tensor without its role (`lora_unet_mid_block_… .lora_down.weight`). A dialect without dots
gives `Flattened` targets. Every target of an image model begins with its component, in the dialect's own word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from loratool.adapters.adapter import Flattened

ONE = "as the tools that read such files do"


@dataclass(frozen=True)
class Spelling:
    """One way to name modules."""

    dialect: str  # that is told, where the header names no tool
    begins: str  # a regular expression
    target: Callable[[str, str], str]  # (what matched, the rest of the module) → the module of the trained model
    rule: str = ONE  # why the scaling is 1 where there is no alpha, as the end of a sentence
    plain: bool = True  # whether other tools write it as well, so that a header's tool is told in its place
    alone: bool = True  # whether the names suffice; else a config in the same folder is believed first
    test: str = ""  # that holds it to the formula


def flat(component: str) -> Callable[[str, str], str]:
    """Targets without dots, of one component."""
    return lambda _, path: Flattened(f"{component}_{path}" if component else path)


def text_encoder(start: str, path: str) -> str:
    """`lora_te1_text_model_…` is `te1_text_model_…`."""
    return Flattened(f"{start.split('_')[1]}_{path}")


def dotted(component: str) -> Callable[[str, str], str]:
    """Targets with dots, of one component."""
    return lambda _, path: f"{component}.{plain(path)}"


def as_named(start: str, path: str) -> str:
    """Targets that name their component themselves."""
    return start + (encoder_path(path) if start.startswith("text_encoder") else plain(path))


def of_comfy(start: str, path: str) -> str:
    """`diffusion_model.…`, and `text_encoders.clip_l.transformer.…`, whose component is `clip_l`."""
    if not start.startswith("text_encoders"):
        return f"diffusion_model.{path}"
    component, _, inside = path.partition(".")
    return f"{component}.{inside.removeprefix('transformer.')}"


def plain(path: str) -> str:
    """A path of a U-Net or a transformer as diffusers has it today: attention processors hold no weights of their own."""
    if ".processor." in path:
        path = path.replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of diffusers before 0.17


def encoder_path(path: str) -> str:
    """A path of a text encoder, which old releases named as an attention of a U-Net."""
    head, dot, last = path.rpartition(".")
    return f"{head}{dot}{OLD_NAMES[last]}" if last in OLD_NAMES else path


UNET = (
    r"down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|time_proj"
    r"|input_blocks|output_blocks|middle_block|time_embed|label_emb"
)
DIT = (  # of diffusers
    r"transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|time_text_embed|norm_out|proj_out"
)
BFL = r"double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer"
# Of Wan, SD3 and Mochi, as far as no model of language or of images alone has such blocks.
ORIGINAL = r"blocks\.\d+\.(?:self_attn|cross_attn|ffn|mlp_[xy]|mod_[xy]|attn\.(?:qkv|q|k|v|kv|proj)_[xy])|joint_blocks"
LANGUAGE = r"(?!h\.\d|wte\.|wpe\.|word_embeddings|blocks\.\d+\.attn\.Wqkv)"  # GPT-2, BLOOM, MPT: they begin so, too

TEST = "adapters/test_dialects.py::test_a_dialect_is_read_as_the_formula_has_it"
DIFFUSERS = "as in diffusers"

SPELLINGS = (
    Spelling("wan-fun", r"lora_unet__", flat("unet"), "as in VideoX-Fun", plain=False, test=TEST),
    Spelling("onetrainer", r"lora_transformer_", flat("transformer"), "as in OneTrainer", test=TEST),
    Spelling("lycoris", r"lycoris_", flat(""), "as in LyCORIS", test=TEST),
    Spelling("kohya", r"(?:lora|oft)_unet_", flat("unet"), "as in kohya's sd-scripts", test=TEST),
    Spelling("kohya", r"(?:lora|oft)_te[123]?_", text_encoder, "as in kohya's sd-scripts", test=TEST),
    Spelling("kohya", r"lora_prior_unet_", flat("prior"), "as in kohya's sd-scripts", test=TEST),
    Spelling("kohya", r"lora_prior_te_", flat("te"), "as in kohya's sd-scripts", test=TEST),
    Spelling(
        "diffusers",
        rf"unet\.|prior\.|transformer(?:_2)?\.{LANGUAGE}|text_encoder(?:_[23])?\.",
        as_named,
        DIFFUSERS,
        test=TEST,
    ),
    Spelling("comfy", r"(?:model\.)?diffusion_model\.|text_encoders\.", of_comfy, "as in ComfyUI", test=TEST),
    Spelling("peft", rf"base_model\.model\.(?=(?:{UNET})\b)", dotted("unet"), DIFFUSERS, alone=False, test=TEST),
    Spelling("peft", rf"base_model\.model\.(?=(?:{DIT})\b)", dotted("transformer"), DIFFUSERS, alone=False, test=TEST),
    Spelling(
        "peft",
        rf"base_model\.model\.(?=(?:{BFL})\b|{ORIGINAL})",
        dotted("diffusion_model"),
        DIFFUSERS,
        alone=False,
        test=TEST,
    ),
    Spelling("diffusers", rf"(?=(?:{UNET})\b)", dotted("unet"), DIFFUSERS, alone=False, test=TEST),
    Spelling("diffusers", rf"(?=(?:{DIT})\b)", dotted("transformer"), DIFFUSERS, alone=False, test=TEST),
    Spelling(
        "bfl", rf"(?=(?:{BFL})\b)", dotted("diffusion_model"), "as in Black Forest Labs' code", alone=False, test=TEST
    ),
    Spelling("original", rf"(?=(?:{ORIGINAL})\b)", dotted("diffusion_model"), DIFFUSERS, alone=False, test=TEST),
)
BEGINS = re.compile("|".join(f"(?P<s{number}>{row.begins})" for number, row in enumerate(SPELLINGS)))


def spelling_of(module: str) -> tuple[Spelling, str] | None:
    """How a module is spelled, and the module of the trained model that it means; None for one of no dialect."""
    match = BEGINS.match(module)
    if match is None:
        return None
    row = SPELLINGS[int(match.lastgroup[1:])]  # type: ignore[index]  # one group is always the last
    target = row.target(match[0], module[match.end() :])
    return None if isinstance(target, Flattened) and "." in target else (row, target)
