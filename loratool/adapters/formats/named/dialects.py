"""The dialects by how names of modules begin, in the order in which they are tried; facts of 2026.

A module is the name of a tensor without its role (`lora_unet_mid_block_… .lora_down.weight`). A dialect without dots
gives `Flattened` targets. Every target of an image model begins with its component, in the dialect's own word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from loratool.adapters.adapter import Flattened
from loratool.notes import Note

# (what matched, the rest of the module) → the modules of the trained model; its rows are theirs, in equal shares
Naming = Callable[[str, str], "str | tuple[str, ...] | None"]


@dataclass(frozen=True)
class ModuleSpelling:
    """One way to name modules."""

    dialect: str  # that is told, where the header names no tool
    begins: str  # a regular expression
    target: Naming
    rule: str  # by which the scaling is 1 where there is no alpha, as the end of a sentence
    plain: bool = True  # whether other tools write it as well, so that a header's tool is told in its place
    alone: bool = True  # whether the names suffice; else a config in the same folder is believed first
    constrained: bool = False  # whether alpha limits rotations also where it is 0
    numbered: bool = False  # whether a module is a number, whose layer the other modules tell
    note: Note | None = None  # that is told of every file with such names


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


XLABS = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)(?:_lora([12]))?")


def of_xlabs(_: str, path: str) -> str | tuple[str, ...] | None:
    """Attention processors of Flux, on its original names; those of single blocks leave the rows of the MLP alone."""
    match = XLABS.fullmatch(path)
    if match is None or (match[1] == "double") != bool(match[4]):
        return None
    blocks, number, layer, stream = match.groups()
    if blocks == "double":
        return f"diffusion_model.double_blocks.{number}.{'img' if stream == '1' else 'txt'}_attn.{layer}"
    if layer == "proj":
        return f"diffusion_model.single_blocks.{number}.linear2"
    return tuple(f"transformer.single_transformer_blocks.{number}.attn.to_{part}" for part in "qkv")


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

KOHYA, DIFFUSERS = "as in kohya's sd-scripts", "as in diffusers"
STRENGTH = Note(
    "default-strength",
    "XLabs' own command line applies such adapters with a strength of 0.7 by default; -w 0.7 does the same",
)

SPELLINGS = (
    ModuleSpelling("wan-fun", r"lora_unet__", flat("unet"), "as in VideoX-Fun", plain=False),
    ModuleSpelling("onetrainer", r"lora_transformer_", flat("transformer"), "as in OneTrainer"),
    ModuleSpelling("lycoris", r"lycoris_", flat(""), "as in LyCORIS"),
    ModuleSpelling("kohya", r"lora_unet_", flat("unet"), KOHYA),
    ModuleSpelling("kohya", r"oft_unet_", flat("unet"), KOHYA, constrained=True),
    ModuleSpelling("kohya", r"lora_te[123]?_", text_encoder, KOHYA),
    ModuleSpelling("kohya", r"lora_prior_unet_", flat("prior"), KOHYA),
    ModuleSpelling("kohya", r"lora_prior_te_", flat("te"), KOHYA),
    ModuleSpelling(
        "xlabs",
        r"(?:diffusion_model\.)?(?=(?:double|single)_blocks\.\d+\.processor\.)",
        of_xlabs,
        "as in XLabs' x-flux",
        plain=False,
        note=STRENGTH,
    ),
    ModuleSpelling(
        "cloneofsimo",
        r"(?:unet|text_encoder(?:_2)?):(?=\d+$)",
        lambda start, number: start + number,
        "as in cloneofsimo's lora_diffusion",
        plain=False,
        numbered=True,
    ),
    ModuleSpelling(
        "diffusers",
        rf"unet\.|prior\.|transformer(?:_2)?\.{LANGUAGE}|text_encoder(?:_[23])?\.|vae\.",
        as_named,
        DIFFUSERS,
    ),
    ModuleSpelling("comfy", r"first_stage_model\.", dotted("vae"), "as in ComfyUI"),
    ModuleSpelling("comfy", r"(?:model\.)?diffusion_model\.|text_encoders\.", of_comfy, "as in ComfyUI"),
    ModuleSpelling("peft", rf"base_model\.model\.(?=(?:{UNET})\b)", dotted("unet"), DIFFUSERS, alone=False),
    ModuleSpelling("peft", rf"base_model\.model\.(?=(?:{DIT})\b)", dotted("transformer"), DIFFUSERS, alone=False),
    ModuleSpelling(
        "peft",
        rf"base_model\.model\.(?=(?:{BFL}|{ORIGINAL})\b)",
        dotted("diffusion_model"),
        DIFFUSERS,
        alone=False,
    ),
    ModuleSpelling("diffusers", rf"(?=(?:{UNET})\b)", dotted("unet"), DIFFUSERS, alone=False),
    ModuleSpelling("diffusers", rf"(?=(?:{DIT})\b)", dotted("transformer"), DIFFUSERS, alone=False),
    ModuleSpelling("bfl", rf"(?=(?:{BFL})\b)", dotted("diffusion_model"), "as in Black Forest Labs' flux", alone=False),
    ModuleSpelling("original", rf"(?=(?:{ORIGINAL})\b)", dotted("diffusion_model"), DIFFUSERS, alone=False),
)
BEGINS = re.compile("|".join(f"(?P<s{number}>{row.begins})" for number, row in enumerate(SPELLINGS)))
# The norms of Flux whose weights control adapters replace, in names of diffusers and in Flux' own.
NORMS = r"(?:transformer\.)?(?:single_)?transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk]\.weight"
ORIGINAL_NORMS = (
    r"(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.(?:\w+\.)?norm\.(?:query|key)_norm\.(?:scale|weight)"
)
REPLACED = re.compile(rf"(?P<original>(?!diffusion_model){ORIGINAL_NORMS})|(?=transformer\.){NORMS}")


def spelling_of(module: str) -> tuple[ModuleSpelling, tuple[str, ...]] | None:
    """How a module is spelled, and the modules of the trained model that it means; None for one of no dialect."""
    match = BEGINS.match(module)
    if match is None:
        return None
    row = SPELLINGS[int(match.lastgroup[1:])]  # type: ignore[index]  # one group is always the last
    target = row.target(match[0], module[match.end() :])
    if not target or (isinstance(target, Flattened) and "." in target):
        return None
    return row, (target,) if isinstance(target, str) else target


def replaced_by(name: str) -> str:
    """The parameter whose value a tensor without a role is; empty where it is no such tensor."""
    match = REPLACED.fullmatch(name)
    return "" if match is None else f"diffusion_model.{name}" if match["original"] else name
