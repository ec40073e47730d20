"""What lies in files of the same kind and is no adapter of weights, or none that can be read: recognised, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Refusal:
    """One kind of file, or of tensors within one."""

    name: str  # as inspect tells it
    tensors: str  # a regular expression that is searched in names which no role ends
    reason: str
    alone: bool = True  # whether such a name makes a file one of these, with nothing else to go by


NOTHING: Mapping[str, str] = MappingProxyType({})
CONTROL_LORA = "Control-LoRA: a ControlNet stored as differences from a U-Net, not an adapter of the U-Net itself"
IP_ADAPTER = "IP-Adapter: layers of its own for an image prompt, which no weight of the base holds"
T_LORA = (
    "T-LoRA (LyCORIS): its update depends on what the base's weights were when training began, and on the time step"
)

REFUSALS = (
    Refusal(
        "textual-inversion",
        r"^(?:emb_params|string_to_param\b.*|clip_[lg]|t5xxl|<[^<>]+>)$",
        "textual inversion: vectors for new tokens, which are loaded next to a model and change none of its weights",
    ),
    Refusal(
        "embeddings",
        r"^bundle_emb\.",
        "bundled embeddings (OneTrainer): vectors for new tokens, which no weight of the base holds; export the adapter "
        "without them, or load both in a tool that reads them",
    ),
    Refusal(
        "controlnet-lllite",
        r"^lllite_",
        "ControlNet-LLLite: small networks that depend on a control image, so they cannot be merged into weights",
    ),
    Refusal(
        "control-lora",
        r"^lora_controlnet$",
        CONTROL_LORA,
    ),
    Refusal(
        "control-lora", r"^(?:zero_convs|input_hint_block|middle_block_out)\.|\.(?:up|down)$", CONTROL_LORA, alone=False
    ),
    Refusal("ip-adapter", r"^ip_adapter\.\d+\.to_[kv]_ip\.", IP_ADAPTER),
    Refusal("ip-adapter", r"^image_proj\.", IP_ADAPTER, alone=False),
    Refusal("t-lora", r"\.lambda_layer$", T_LORA),
    Refusal("t-lora", r"\.[pq]_layer\.weight$", T_LORA, alone=False),
    Refusal(
        "numbered",
        r"^w_[ab]_\d+$",
        "LoRA for ViT or SAM with numbered factors (w_a_000): nothing in the file says which layers they belong to",
    ),
    Refusal(
        "adalora",
        r"\.lora_E(?:\.weight)?$",
        "AdaLoRA (lora_E): its scale is in a config that the file does not contain; read it as PEFT saved it, with its "
        "adapter_config.json",
        alone=False,
    ),
    Refusal(
        "vera",
        r"(?:^|\.)vera_(?:lambda_[bd]|[AB])\b",
        "VeRA: its projections are drawn by the tool that trained it; read it as PEFT saved it, with its "
        "adapter_config.json",
        alone=False,
    ),
)
EMBEDDINGS = ("textual-inversion", "embeddings")  # rows of the table that are no part of the base's weights
FLAG = "<embed>"  # what cloneofsimo's lora_diffusion writes into the header under the name of each token
ANY = re.compile("|".join(f"(?P<r{number}>{row.tensors})" for number, row in enumerate(REFUSALS)))


def refused(names: Iterable[str], metadata: Mapping[str, str] = NOTHING) -> Iterator[tuple[str, Refusal]]:
    """Each name that a row of the table, or an entry of the header, recognises, with that row."""
    for name in names:
        if metadata.get(name) == FLAG:
            yield name, REFUSALS[0]
        elif match := ANY.search(name):
            yield name, REFUSALS[int(match.lastgroup[1:])]  # type: ignore[index]  # one group is always the last
