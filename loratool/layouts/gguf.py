"""How GGUF files name and arrange the weights of models: data, no logic.

Facts from the converters of llama.cpp (`conversion/`, 2026-11), which turn the names and weights of transformers into
these. Names are those of modules, with `#` for the number of a layer; a `.weight` or `.bias` follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Rows:
    """The order of rows in a GGUF file, by that of transformers.

    In transformers they are those of `groups` one after the other, each of which has parts of so many heads. In a
    GGUF file all first parts come first, then all second ones. Without parts, each of the `groups` is a head whose
    halves, which rotate together, come in turns.
    """

    groups: str  # "heads" or "key heads"
    parts: tuple[int, ...] = ()  # heads of each; 0 for the heads of queries that share one of keys


HEADS, KEY_HEADS = "heads", "key heads"
ROTARY = {"attn_q": Rows(HEADS), "attn_k": Rows(KEY_HEADS)}
BY_HEADS = {"attn_qkv": Rows(HEADS, (1, 1, 1))}


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    model_type: str  # of transformers
    layers: str = "model.layers"
    modules: Mapping[str, str] = field(default_factory=dict)  # of a layer: name here → name there
    outside: Mapping[str, str] = field(default_factory=dict)  # of the rest
    rows: Mapping[str, Rows] = field(default_factory=dict)  # of modules of a layer whose rows are in another order
    norms_shifted: bool = False  # norms hold 1 + w
    has_head: bool = True  # llama.cpp loads a head that is not tied


OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
# Stacks of all experts of a layer, whose names in transformers end here: (experts, out, in).
STACKS: Mapping[str, str] = MappingProxyType(
    {
        "ffn_gate_exps": "mlp.experts.gate_proj",
        "ffn_up_exps": "mlp.experts.up_proj",
        "ffn_down_exps": "mlp.experts.down_proj",
        "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    }
)
LLAMA = {**ATTENTION, **MLP, **MOE}
GEMMA2 = {
    **ATTENTION,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OLMO2 = {
    **{name: there for name, there in {**ATTENTION, **MLP}.items() if name not in ("attn_norm", "ffn_norm")},
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
DEEPSEEK = {
    **LLAMA,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
FUSED_HEADS = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attention.dense",
    "attn_qkv": "self_attention.query_key_value",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
IN_H = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_OUTSIDE = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


def without_ffn_norm(modules: Mapping[str, str]) -> dict[str, str]:
    """The same where the norm before the MLP has another name."""
    return {name: there for name, there in modules.items() if name != "ffn_norm"}


def llama_like(model_type: str, **more: object) -> Architecture:
    """One whose modules have the names of Llama's."""
    return Architecture(model_type, modules=LLAMA, outside=OUTSIDE, **more)  # type: ignore[arg-type]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": llama_like("llama", rows=ROTARY),
    "mistral3": llama_like("ministral3", rows=ROTARY),
    "arcee": llama_like("arcee", rows=ROTARY),
    "smollm3": llama_like("smollm3", rows=ROTARY),
    "granite": llama_like("granite", rows=ROTARY),
    "minicpm": llama_like("minicpm", rows=ROTARY),
    "deci": llama_like("nemotron-nas", rows=ROTARY),
    "olmo": llama_like("olmo", rows=ROTARY),
    "xverse": llama_like("xverse", rows=ROTARY),
    "qwen2": llama_like("qwen2"),
    "qwen2moe": llama_like("qwen2_moe"),
    "qwen3": llama_like("qwen3"),
    "qwen3moe": llama_like("qwen3_moe"),
    "olmoe": llama_like("olmoe"),
    "seed_oss": Architecture(
        "seed_oss",
        modules={**without_ffn_norm(LLAMA), "post_attention_norm": "post_attention_layernorm"},
        outside=OUTSIDE,
    ),
    "command-r": llama_like("cohere", has_head=False),
    "cohere2": llama_like("cohere2", has_head=False),
    "gemma": llama_like("gemma", norms_shifted=True, has_head=False),
    "gemma2": Architecture("gemma2", modules=GEMMA2, outside=OUTSIDE, norms_shifted=True, has_head=False),
    "gemma3": Architecture("gemma3_text", modules=GEMMA2, outside=OUTSIDE, norms_shifted=True),
    "olmo2": Architecture("olmo2", modules=OLMO2, outside=OUTSIDE),
    "exaone4": Architecture("exaone4", modules=OLMO2, outside=OUTSIDE),
    "deepseek2": Architecture("deepseek_v3", modules=DEEPSEEK, outside=OUTSIDE),
    "gpt-oss": Architecture(
        "gpt_oss",
        modules={**ATTENTION, "ffn_gate_inp": "mlp.router", "post_attention_norm": "post_attention_layernorm"},
        outside=OUTSIDE,
    ),
    "phi3": Architecture(
        "phi3",
        modules={**ATTENTION, "attn_qkv": "self_attn.qkv_proj", **MLP, "ffn_up": "mlp.gate_up_proj"},
        outside=OUTSIDE,
    ),
    "phi2": Architecture(
        "phi",
        modules={**ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        outside={**OUTSIDE, "output_norm": "model.final_layernorm"},
    ),
    "stablelm": Architecture("stablelm", modules={**ATTENTION, **MLP}, outside=OUTSIDE),
    "starcoder2": Architecture(
        "starcoder2", modules={**ATTENTION, **MLP, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, outside=OUTSIDE
    ),
    "starcoder": Architecture("gpt_bigcode", "transformer.h", GPT2, GPT2_OUTSIDE),
    "gpt2": Architecture("gpt2", "transformer.h", GPT2, GPT2_OUTSIDE),
    "bloom": Architecture(
        "bloom",
        "transformer.h",
        FUSED_HEADS,
        {**IN_H, "token_embd_norm": "transformer.word_embeddings_layernorm"},
        BY_HEADS,
    ),
    "falcon": Architecture(
        "falcon",
        "transformer.h",
        {**FUSED_HEADS, "attn_norm_2": "ln_attn"},
        IN_H,
        {"attn_qkv": Rows(KEY_HEADS, (0, 1, 1))},
    ),
    "gptneox": Architecture(
        "gpt_neox",
        "gpt_neox.layers",
        {**FUSED_HEADS, "attn_output": "attention.dense", "attn_qkv": "attention.query_key_value"},
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        BY_HEADS,
    ),
    "mpt": Architecture(
        "mpt",
        "transformer.blocks",
        {
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
    ),
}

# Model types of transformers → the architecture that llama.cpp's converter makes of them.
MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **{architecture.model_type: name for name, architecture in ARCHITECTURES.items()},
        **dict.fromkeys(("mistral", "mixtral", "internlm3"), "llama"),
        "gemma3": "gemma3",
        "deepseek_v2": "deepseek2",
    }
)

# Entries of the metadata, after the architecture's name, and what configs of transformers call them.
SIZES: Mapping[str, str] = MappingProxyType(
    {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "expert_count": "num_experts",
    }
)
