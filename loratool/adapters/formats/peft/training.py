"""What `adapter_config.json` says of the training, in the words of `Training`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loratool.adapters.formats.peft import support
from loratool.adapters.training import ExpertAxes, Targets, Training
from loratool.notes import Note

QUANTISED = "The following `bitsandbytes` quantization config was used during training:"  # of whatever kind it is
SETTING = re.compile(r"^- (\w+): (\S+)$", re.MULTILINE)
VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
# Types whose files have the same tensors for two kinds of layers: their name, and the kind that is not linear.
UNTOLD = {"ADALORA": ("AdaLoRA", "a Conv2d"), "TINYLORA": ("TinyLoRA", "an embedding")}
# Our word for what others may not know → the field that says it, where it says anything but no.
FEATURES = {
    "rslora": "use_rslora",
    "rank-pattern": "rank_pattern",
    "alpha-pattern": "alpha_pattern",
    "alora": "alora_invocation_tokens",
    "layer-replication": "layer_replication",
    "bdlora": "use_bdlora",
    "qalora": "use_qalora",
    "initialisation": "init_lora_weights",
}


def training_of(config: Mapping[str, Any]) -> Training:
    """What a config says; values that are not of their field's type say nothing."""
    start = config.get("init_lora_weights", True)
    rank, saved = config.get("r"), config.get("modules_to_save")
    method = str(config.get("peft_type", "LORA"))
    return Training(
        base=text(config.get("base_model_name_or_path")),
        revision=text(config.get("revision")),
        task=text(config.get("task_type")),
        model_class=model_class(config),
        method=method,
        variants=support.variants(config),
        features={word: name for word, name in FEATURES.items() if config.get(name)},
        initialisation=text(start),
        rank=rank if isinstance(rank, int) else None,
        rslora=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        dropout=float(dropout) if isinstance(dropout := config.get("lora_dropout"), (int, float)) else 0.0,
        rank_pattern=numbers(config.get("rank_pattern")),
        alpha_pattern=numbers(config.get("alpha_pattern")),
        zero_alpha=has_zero(config),
        saved_modules=tuple(saved) if isinstance(saved, list) else (),
        bias=str(config.get("bias") or "none"),
        lora_bias=config.get("lora_bias") is True,
        targets=targets_of(config),
        in_out=flag if isinstance(flag := config.get("fan_in_fan_out"), bool) else None,
        expert_axes=expert_axes(config.get("peft_version")),
        release=text(config.get("peft_version")),
        notes_as_lora=notes_as_lora(method),
    )


def quantised_in(card: str) -> str:
    """How the model was quantised in training, as PEFT writes it into a card, a line for each setting; empty for none."""
    _, found, listing = card.partition(QUANTISED)
    if not found:
        return ""
    said = dict(SETTING.findall(listing.lstrip("\n").partition("\n\n")[0]))
    if said.get("load_in_4bit") == "True":
        return f"bitsandbytes {said.get('bnb_4bit_quant_type', '4-bit')}"
    if said.get("load_in_8bit") == "True":
        return "bitsandbytes int8"
    method = said.get("quant_method", "").rpartition(".")[2].lower()  # an enumeration's member in some releases
    return "" if method in ("bitsandbytes", "bits_and_bytes") else method


def text(value: object) -> str:
    return value if isinstance(value, str) else ""


def numbers(value: object) -> dict[str, float]:
    """A pattern field as far as it is one."""
    table = value if isinstance(value, Mapping) else {}
    known = {k: v for k, v in table.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {pattern: number for pattern, number in known.items() if math.isfinite(number)}


def has_zero(config: Mapping[str, Any]) -> bool:
    """Whether an α of the config is 0."""
    table = config.get("alpha_pattern")
    values = [config.get("lora_alpha"), config.get("alpha"), *(table.values() if isinstance(table, dict) else ())]
    return any(value == 0 and not isinstance(value, bool) for value in values)


def model_class(config: Mapping[str, Any]) -> str:
    """The class that PEFT notes for an adapter without a task."""
    mapping = config.get("auto_mapping")
    return text(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else ""


def targets_of(config: Mapping[str, Any]) -> Targets | None:
    """What lists of the config ask for. A pattern in place of a list says less than the tensors do."""
    modules, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not isinstance(modules, list) or isinstance(excluded, str):
        return None
    layers = config.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [layers]
    return Targets(tuple(modules), tuple(excluded or ()), None if layers is None else frozenset(map(str, chosen)))


def release_of(version: object) -> tuple[int, ...]:
    """The numbers of a release; all 0 where a config names none, as before 0.18."""
    match = VERSION.match(version) if isinstance(version, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else (0, 0, 0)


def expert_axes(version: object) -> ExpertAxes:
    """How a release stored experts: one way before PEFT 0.19.0, another in it, and a third from then on."""
    release = release_of(version)
    if release < (0, 19, 0):
        return "first"
    return "against the flag" if release == (0, 19, 0) else "as flagged"


def notes_as_lora(method: str) -> tuple[Note, ...]:
    """What a user of plain LoRA made of an adapter should know."""
    if method not in UNTOLD:
        return ()
    title, layer = UNTOLD[method]
    return (
        Note(
            "layer-kind-unknown",
            f"{title}'s file does not distinguish {layer} from a linear layer, so all are written as linear layers. "
            f"If one is {layer}, PEFT cannot load the result; merge the adapter instead and run `loratool extract` on "
            "the merged model",
        ),
    )
