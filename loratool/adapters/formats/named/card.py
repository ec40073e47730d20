"""What the card of an adapter of an image or video model says of it, from the header of its file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapters.training import Training
from loratool.errors import printable
from loratool.files.hub_cache import is_hub_id
from loratool.provenance.cards import Subject

TRIGGER = "modelspec.trigger_phrase"  # the words that call up what was trained
MODELS = ("ss_base_model_version", "modelspec.architecture", "ss_network_module")  # entries that tell the architecture
OF_MUSUBI = "networks.lora_"  # before the architecture in the name of a module of kohya's tools
# Roles that diffusers does not load, and the entry that stands among those of a header where a file has some.
OTHER_ROLES = re.compile(r"\.(?:hada_|lokr_|oft_|boft_|on_input|a1\.|b1\.|lora_mid|diff$|diff_b$|w_norm$|b_norm$)")
NOT_IN_DIFFUSERS = "loratool.not_in_diffusers"
FILE = re.compile(r"\.(?:safetensors|ckpt|pth?|bin|gguf)$", re.IGNORECASE)


TO_IMAGE, TO_VIDEO = "text-to-image", "text-to-video"


@dataclass(frozen=True)
class Family:
    """Models that the Hub has one tag for."""

    said: re.Pattern[str]  # how the words begin that headers have for them
    tags: tuple[str, ...] = ()
    task: str = TO_IMAGE
    dtype: str = "bfloat16"  # that its pipelines run in
    base: str = ""  # on the Hub, of those that these words and a file's name mean one model
    file: re.Pattern[str] | None = None  # what that model's file is called; tools have the same words for its relatives


FAMILIES = (
    Family(re.compile(r"sd_v[12]|sd_[12]\.|stable-diffusion-v[12]"), ("stable-diffusion",), dtype="float16"),
    Family(
        re.compile(r"sdxl_base_v1-0|stable-diffusion-xl-v1-base(?:/|$)"),
        ("stable-diffusion-xl",),
        dtype="float16",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        file=re.compile(r"sd_xl_base_1\.0(?:_0\.9vae)?\.safetensors"),
    ),
    Family(re.compile(r"sdxl|stable-diffusion-xl"), ("stable-diffusion-xl",), dtype="float16"),
    Family(re.compile(r"sd3|stable-diffusion-3"), ("sd3",)),
    Family(
        re.compile(r"flux-1-schnell(?:/|$)"),
        ("flux",),
        base="black-forest-labs/FLUX.1-schnell",
        file=re.compile(r"flux1-schnell\.safetensors"),
    ),
    Family(re.compile(r"flux"), ("flux",)),  # dev or schnell: kohya's tools write one word for both
    Family(re.compile(r"lumina-?2"), ("lumina2",)),
    Family(re.compile(r"qwen-?_?image"), ("qwen-image",)),
    Family(re.compile(r"wan[-_ ]?\d|wan(?:/|$)"), ("wan",), task=TO_VIDEO),
    Family(re.compile(r"hunyuan[-_]?video|framepack|hv_1_5"), ("hunyuan-video",), task=TO_VIDEO),
)
UNKNOWN = Family(re.compile(""))


def family_of(header: Mapping[str, str]) -> Family:
    """The family of models that a header names."""
    said = [str(header.get(key, "")).lower().removeprefix(OF_MUSUBI) for key in MODELS]
    if "ai-toolkit" in str(header.get("software", "")) and said[0] == "sd_1.5":
        del said[0]  # older releases wrote it for every model but Stable Diffusion 2 and SDXL, Flux too
    return next((family for text in said for family in FAMILIES if family.said.match(text)), UNKNOWN)


def base_of(header: Mapping[str, str], named: str) -> str:
    """The base's id on the Hub: the one that was named, or that of the file that was; none where no model is named.

    Finetunes such as Pony count as SDXL for the tools that write headers.
    """
    if is_hub_id(named) and not FILE.search(named):
        return named
    family = family_of(header)
    return family.base if family.file and family.file.fullmatch(os.path.basename(named)) else ""


def subject(header: Mapping[str, str], training: Training) -> Subject:
    """The adapter whose file has a header, which says this of its training."""
    family = family_of(header)
    prompt = str(header.get(TRIGGER, "")).strip()
    return Subject(
        title="LoRA adapter",
        trained_with="a tool for image models",
        library="diffusers",
        tags=(family.task, "diffusers", "lora", "template:sd-lora", *family.tags),
        base=base_of(header, training.base),
        ranks=(training.rank,) if training.rank else (),
        snippet=no_snippet if NOT_IN_DIFFUSERS in header else snippet_of(family, prompt or "PROMPT"),
        prompt=prompt,
    )


def snippet_of(family: Family, prompt: str) -> Callable[[str, str], list[str]]:
    """Python that makes an image or a video with the adapter, as lines from its base and its place."""
    video, shown = family.task == TO_VIDEO, json.dumps(printable(prompt))
    ends = (
        [f"video = pipeline({shown}).frames[0]", 'export_to_video(video, "video.mp4")']
        if video
        else [f"image = pipeline({shown}).images[0]", 'image.save("image.png")']
    )
    return lambda base, where: [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *(["from diffusers.utils import export_to_video"] if video else []),
        "",
        f"base = {json.dumps(printable(base))}",
        f"pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.{family.dtype})",
        f"place = {where}",
        "pipeline.load_lora_weights(place)",
        'pipeline.to("cuda")',
        *ends,
    ]


def no_snippet(base: str, where: str) -> list[str]:  # noqa: ARG001 (it is the same for all)
    """For what diffusers does not load."""
    return []


def told_of(headers: Sequence[Mapping[str, str]], names: Iterable[str]) -> dict[str, str]:
    """The entries that all headers of a folder have alike, and whether diffusers would not load tensors of these names."""
    found = {key: value for key, value in common(headers).items() if key != NOT_IN_DIFFUSERS}
    return found | ({NOT_IN_DIFFUSERS: "true"} if any(map(OTHER_ROLES.search, names)) else {})


def common(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all headers have alike."""
    first = headers[0] if headers else {}
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in headers[1:])}
