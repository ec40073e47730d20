"""What the card of an adapter in PEFT's layout says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from loratool.errors import printable
from loratool.provenance.cards import CLASS, Subject

MODELS_OF_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def subject(config: Mapping[str, Any]) -> Subject:
    """The adapter with a config."""
    lora = config.get("peft_type") in (None, "LORA")
    return Subject(
        title=f"{'LoRA' if lora else 'PEFT'} adapter",
        trained_with="PEFT",
        library="peft",
        tags=("lora", "peft") if lora else ("peft",),
        base=str(config.get("base_model_name_or_path") or ""),
        ranks=ranks_of(config),
        snippet=snippet_of(config),
    )


def ranks_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    rank, pattern = config.get("r"), config.get("rank_pattern")
    if not isinstance(rank, int):
        return ()
    others = pattern.values() if isinstance(pattern, dict) else ()
    return tuple(sorted({rank, *(value for value in others if isinstance(value, int))}))


def snippet_of(config: Mapping[str, Any]) -> Callable[[str, str], list[str]]:
    """Python that loads the adapter, as lines from its base and its place."""
    name = MODELS_OF_TASKS.get(str(config.get("task_type"))) or trained_class(config) or "AutoModel"
    return lambda base, where: [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({json.dumps(printable(base))})",
        f"place = {where}",
        "model = PeftModel.from_pretrained(base, place)",
    ]


def trained_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that PEFT notes for an adapter without a task; empty where it does not."""
    noted = config.get("auto_mapping")
    found = noted.get("base_model_class") if isinstance(noted, Mapping) else None
    if not isinstance(found, str) or not CLASS.fullmatch(found):
        return ""
    return found if str(noted and noted.get("parent_library")).startswith("transformers.") else ""
