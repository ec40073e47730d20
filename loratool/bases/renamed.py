"""Weights of a GGUF model as transformers has them: its names, and rows in its order.

    base = renamed(decoded(open_checkpoint("model.gguf")))
    weight = weight_of(base, "model.layers.0.self_attn.q_proj.weight")

What transformers holds otherwise, such as the experts of a layer, has no such weight; `why_not` says so.
"""

from __future__ import annotations

from loratool.adapters.gguf_names import in_model
from loratool.bases.binding.named import Named, named
from loratool.files.checkpoint import Checkpoint
from loratool.files.gguf import GgufFile
from loratool.layouts.gguf import ARCHITECTURES, STACKS


def renamed(base: Checkpoint) -> Checkpoint:
    """A model of llama.cpp's as transformers has it; any other as it is, GGUF files of image models too."""
    first = base.shards[0] if base.shards else None
    known = isinstance(first, GgufFile) and first.text("general.architecture") in ARCHITECTURES
    return (named(base) if known else None) or base


def why_not(base: Checkpoint, name: str) -> str:
    """Why a difference of a weight can be none of an adapter's; empty where it can."""
    if not isinstance(base, Named) or name not in base.in_files or not isinstance(first := base.shards[0], GgufFile):
        return ""
    there = base.in_files[name]
    found, row = in_model(there, ARCHITECTURES[first.text("general.architecture")]), base.rows[there]
    if not found.known:
        return "its name in transformers is not known"
    if row.shifted:
        return "a GGUF file stores it with 1 added to it"
    if any(found.name.endswith(stack) for stack in STACKS.values()):
        return "it holds all experts of a layer, which transformers stores differently"
    if row.order is not None and not base.is_ordered(there):
        return "a GGUF file stores its rows in another order"
    return ""
