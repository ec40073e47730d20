"""Whether an adapter was trained on quantised weights, held against the base that it is merged into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.bases.decoded import Decoded
from loratool.errors import printable
from loratool.files.checkpoint import Checkpoint
from loratool.notes import Note

# What names of quantised models have in them: unsloth/llama-3-8b-bnb-4bit, org/Qwen2.5-7B-Instruct-GPTQ-Int4
MARK = re.compile(
    r"[-_.](?:bnb|nf4|fp4|gptq|awq|hqq|eetq|aqlm|quanto|torchao|quantized|quantised|fp8|nvfp4|mxfp[48]|int[48]"
    r"|w[48]a(?:4|8|16)(?:fp8)?|[2-8]-?bits?)(?=[-_.]|$)",
    re.IGNORECASE,
)


def is_marked(name: str) -> bool:
    """Whether the name or the path of a model says that it is quantised."""
    return MARK.search(last_part(name)) is not None


def unmarked(name: str) -> str:
    """The last part of a model's name without what says that it is quantised, in lower case."""
    return MARK.sub("", last_part(name)).lower()


def last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def unlike_packing(base: Checkpoint, known: str, adapter: Adapter, named: Mapping[str, Any]) -> Note | None:
    """A note where either the adapter's base or the one it is merged into is quantised, and the other is not.

    Args:
        base: that it is merged into, decoded.
        known: the name of `base`.
        adapter: whose files say what it was trained on.
        named: the config of the base that it names; empty where that is not on this machine.
    """
    name, said = adapter.training.base, adapter.training.quantised
    packed = isinstance(base, Decoded)
    trained_packed = bool(said or is_marked(name) or named.get("quantization_config"))
    if packed == trained_packed or (name and last_part(name) == last_part(known)):
        return None
    if trained_packed:
        what = printable(said or name)
        return Note(
            "trained-quantised",
            f"was trained on quantised weights ({what}), but BASE is plain; unless BASE is a dequantised copy of them, "
            "pass the quantised model as BASE to get the model that was trained",
        )
    if not name or (not named and unmarked(name) == unmarked(known) and not is_marked(known)):
        return None  # what it names may be quantised as well
    return Note(
        "trained-plain",
        f"names {printable(name)} as its base, but BASE is quantised; unless it was trained on a quantised copy, as with "
        f"QLoRA, pass {printable(name)} as BASE to get the model that was trained",
    )
