"""Shapes of every parameter of a decoder, worked out from its config alone.

Facts from the model classes of transformers 5.23. Names and shapes are those of the class for causal language modelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

Shapes = dict[str, tuple[int, ...]]

INPUT_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
SANDWICH = (INPUT_NORM, MLP_NORM, "pre_feedforward_layernorm", "post_feedforward_layernorm")


MOST_LAYERS = 10_000  # a config is a foreign file: no number in it may keep us for ever


@dataclass(frozen=True)
class Family:
    """What sets one family apart from Llama."""

    biased: tuple[str, ...] = ()  # linear layers with a bias, whatever the config says
    flags: Mapping[str, tuple[str, ...]] | None = None  # field of the config → the layers that it gives a bias
    head_size: int | None = None  # where the config has no head_dim; hidden_size / num_attention_heads for None
    head_norms: bool = False  # each head's q and k are normed
    norms: tuple[str, ...] = (INPUT_NORM, MLP_NORM)
    fused: bool = False  # q, k, v in one weight, gate and up in another
    tied: bool = False  # where the config has no tie_word_embeddings


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ATTENTION_BIAS = {"attention_bias": ATTENTION}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(flags={**ATTENTION_BIAS, "mlp_bias": MLP}),
    "mistral": Family(),
    "qwen2": Family(biased=ATTENTION[:3]),
    "qwen3": Family(flags=ATTENTION_BIAS, head_size=128, head_norms=True),
    "gemma": Family(flags=ATTENTION_BIAS, head_size=256, tied=True),
    "gemma2": Family(flags=ATTENTION_BIAS, head_size=256, norms=SANDWICH, tied=True),
    "gemma3_text": Family(flags=ATTENTION_BIAS, head_size=256, head_norms=True, norms=SANDWICH, tied=True),
    "phi3": Family(fused=True),
}


def like_llama(family: Family, config: Mapping[str, Any]) -> tuple[Shapes, bool]:
    """Name → shape, (out, in) of linear layers, and whether the head is the embedding."""
    hidden, inner, vocabulary = (config[f] for f in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = config["num_attention_heads"]
    pairs = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or family.head_size or hidden // heads
    linear = {
        "self_attn.q_proj": (heads * size, hidden),
        "self_attn.k_proj": (pairs * size, hidden),
        "self_attn.v_proj": (pairs * size, hidden),
        "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if family.fused:
        linear = {
            "self_attn.qkv_proj": ((heads + 2 * pairs) * size, hidden),
            "self_attn.o_proj": linear["self_attn.o_proj"],
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": linear["mlp.down_proj"],
        }
    flagged = (layers for field, layers in (family.flags or {}).items() if config.get(field))
    biased = {*family.biased, *(layer for layers in flagged for layer in layers)}
    layer: Shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in linear.items() if name.rpartition(".")[2] in biased}
    layer |= {f"{norm}.weight": (hidden,) for norm in family.norms}
    if family.head_norms:
        layer |= {f"self_attn.{norm}.weight": (size,) for norm in ("q_norm", "k_norm")}
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for number in range(some_layers(config["num_hidden_layers"])):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return with_head(shapes, (vocabulary, hidden), config.get("tie_word_embeddings", family.tied))


def gpt2(config: Mapping[str, Any]) -> tuple[Shapes, bool]:
    """The same for GPT-2, whose linear layers are Conv1D: (in, out)."""
    hidden, vocabulary = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    layer: Shapes = {}
    for name, columns, rows in (
        ("attn.c_attn", 3 * hidden, hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", inner, hidden),
        ("mlp.c_proj", hidden, inner),
    ):
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    norm = {"weight": (hidden,), "bias": (hidden,)}
    layer |= {f"{name}.{part}": shape for name in ("ln_1", "ln_2") for part, shape in norm.items()}
    shapes: Shapes = {
        "transformer.wte.weight": (vocabulary, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        **{f"transformer.ln_f.{part}": shape for part, shape in norm.items()},
    }
    for number in range(some_layers(config["n_layer"])):
        shapes |= {f"transformer.h.{number}.{name}": shape for name, shape in layer.items()}
    return with_head(shapes, (vocabulary, hidden), config.get("tie_word_embeddings", True))


def some_layers(count: int) -> int:
    if not 0 < count <= MOST_LAYERS:
        raise ValueError(f"{count} layers; expected 1 to {MOST_LAYERS}")
    return count


def with_head(shapes: Shapes, head: tuple[int, int], tied: bool) -> tuple[Shapes, bool]:
    return {**shapes, "lm_head.weight": head}, bool(tied)


# Model type → from a config the shapes of all parameters, the head last, and whether the head is the embedding.
# `KeyError` names a field that is wanted and not there; a number that is none is a `TypeError` or a `ValueError`.
SHAPES: Mapping[str, Callable[[Mapping[str, Any]], tuple[Shapes, bool]]] = {
    **{name: partial(like_llama, family) for name, family in FAMILIES.items()},
    "gpt2": gpt2,
}
