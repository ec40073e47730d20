"""Tensors that hold several projections, or all experts: data, no logic.

Facts from the model code and the conversion mapping of transformers 5.23, and from the code that
models without a home in transformers bring along. Names are written as in `renames`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fusion:
    """A tensor whose output rows are those of its parts, one after the other.

    The order may repeat: with `repeats` of 4 the rows are a quarter of each part, four times over. Where the parts
    are named with a number more than the tensor, that number counts experts, which are its first dimension.
    """

    fused: str
    parts: tuple[str, ...]  # in the order of their rows
    sizes: str = ""  # a letter for each part, parts with the same letter being equally large; "" for all alike
    repeats: int | tuple[str, ...] = 1  # how often the order repeats, or the config fields that say so
    models: frozenset[str] = field(default_factory=frozenset)  # the model types that are so; none for all others
    when: tuple[tuple[str, object, object], ...] = ()  # (config field, value it must have, value where absent)

    @property
    def of_experts(self) -> bool:
        return self.parts[0].count("#") > self.fused.count("#")


HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv", "num_query_groups"),
    "n_query_groups",
)
# Falcon and GPT-BigCode have one head of keys where the first is set, but not where Falcon has groups as well.
ONE_KEY_HEAD, GROUPED = "multi_query", "new_decoder_architecture"
LINEAR_KEY_HEADS = ("linear_num_key_heads",)

# Spellings of the three projections of attention.
QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))


def attention(
    fused: str,
    *models: str,
    order: str = "qkv",
    repeats: int | tuple[str, ...] = 1,
    when: tuple[tuple[str, object, object], ...] = (),
) -> tuple[Fusion, ...]:
    """A row for each spelling of the parts."""
    sizes = "".join("q" if part == "q" else "k" for part in order)
    spelt = [tuple(names["qkv".index(part)] for part in order) for names in QKV]
    return tuple(Fusion(fused, names, sizes, repeats, frozenset(models), when) for names in spelt)


FUSIONS: tuple[Fusion, ...] = (
    # query, key and value
    *attention("qkv_proj"),
    *attention("qkv_proj", "codegen", order="qvk", repeats=4),
    *attention("qkv"),
    *attention("Wqkv"),
    *attention("W_pack"),
    *attention("att_proj"),
    *attention("w_qkv"),
    *attention("c_attn"),
    *attention("c_attn", "gpt_bigcode", when=(("multi_query", True, True),)),
    *attention("c_attn", "gpt_bigcode", repeats=HEADS, when=(("multi_query", False, True),)),
    *attention("wqkv", "internlm2", repeats=KEY_HEADS),
    *attention("query_key_value", "gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", repeats=HEADS),
    *attention(
        "query_key_value", "falcon", "RefinedWeb", repeats=KEY_HEADS, when=(("new_decoder_architecture", True, False),)
    ),
    *attention(
        "query_key_value",
        *("falcon", "RefinedWebModel"),
        when=(("new_decoder_architecture", False, False), ("multi_query", True, True)),
    ),
    *attention(
        "query_key_value",
        "falcon",
        repeats=HEADS,
        when=(("new_decoder_architecture", False, False), ("multi_query", False, True)),
    ),
    *attention("query_key_value", "chatglm", when=(("multi_query_attention", True, False),)),
    *attention("query_key_value", "chatglm", repeats=HEADS, when=(("multi_query_attention", False, False),)),
    Fusion("in_proj_weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "qkk"),
    Fusion("in_proj_bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "qkk"),
    Fusion("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "qkk"),
    Fusion("attention.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkk"),
    Fusion("attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkk"),
    Fusion("mixer.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkk"),
    Fusion("gqkv_proj", ("gate_proj", "q_proj", "k_proj", "v_proj")),
    Fusion("conv1d", ("q_conv1d", "k_conv1d", "v_conv1d"), "qqv"),
    # linear attention, by key head
    Fusion("in_proj_qkvz", ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"), "qqvv", LINEAR_KEY_HEADS),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a"), repeats=LINEAR_KEY_HEADS),
    # gate and up
    Fusion("gate_up_proj", ("gate_proj", "up_proj")),
    Fusion("up_gate_proj", ("up_proj", "gate_proj")),
    Fusion("weights_in", ("gate_proj", "up_proj")),
    Fusion("w12", ("gate_proj", "up_proj")),
    Fusion("ff_proj", ("up_proj", "gate_proj")),
    Fusion("dense_h_to_4h", ("gate_proj", "up_proj")),
    Fusion("mlp.experts.gate_up_proj", ("moe.gate_proj.weight", "moe.up_proj.weight")),
    # experts
    Fusion("experts.gate_up_proj", ("experts.#.gate_proj.weight", "experts.#.up_proj.weight")),
    Fusion("experts.gate_up_proj", ("experts.#.w1.weight", "experts.#.w3.weight")),
    Fusion("experts.gate_up_proj", ("experts.#.fc1.weight", "experts.#.fc3.weight")),
    Fusion("experts.gate_up_proj", ("experts.#.gate_up_proj.weight",)),
    Fusion("experts.gate_up_proj", ("experts.gate_up_projs.#.weight",)),
    Fusion("experts.down_proj", ("experts.#.down_proj.weight",)),
    Fusion("experts.down_proj", ("experts.#.w2.weight",)),
    Fusion("experts.down_proj", ("experts.#.fc2.weight",)),
    Fusion("experts.down_proj", ("experts.down_projs.#.weight",)),
    Fusion("experts.up_proj", ("experts.#.up_proj.weight",)),
    # the same under the names that some families have on disk
    Fusion(
        "block_sparse_moe.input_linear.weight",
        ("block_sparse_moe.experts.#.gate_proj.weight", "block_sparse_moe.experts.#.up_proj.weight"),
    ),
    Fusion("block_sparse_moe.output_linear.weight", ("block_sparse_moe.experts.#.down_proj.weight",)),
    Fusion("experts.fc1.weight", ("experts.#.gate_proj.weight", "experts.#.up_proj.weight")),
    Fusion("experts.fc2.weight", ("experts.#.down_proj.weight",)),
    Fusion("moe.gate_proj.weight", ("mlp.experts.#.gate_proj.weight",)),
    Fusion("moe.up_proj.weight", ("mlp.experts.#.up_proj.weight",)),
    Fusion("moe.down_proj.weight", ("mlp.experts.#.down_proj.weight",)),
    # the same as MLX models have them
    Fusion("switch_mlp.gate_proj.weight", ("experts.#.gate_proj.weight",)),
    Fusion("switch_mlp.gate_proj.weight", ("experts.#.w1.weight",)),
    Fusion("switch_mlp.down_proj.weight", ("experts.#.down_proj.weight",)),
    Fusion("switch_mlp.down_proj.weight", ("experts.#.w2.weight",)),
    Fusion("switch_mlp.up_proj.weight", ("experts.#.up_proj.weight",)),
    Fusion("switch_mlp.up_proj.weight", ("experts.#.w3.weight",)),
    # stacks of one part of all experts
    Fusion("experts.gate_up_proj", ("experts.gate_proj", "experts.up_proj")),
    Fusion("experts.gate_proj", ("experts.#.gate_proj.weight",)),
)

# Modules beside each other that vLLM and SGLang hold as one: their weights must be stored in one way.
SERVED_TOGETHER = (
    *QKV,
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

# What vLLM calls some of them in its own models, and in questions to a config's list of modules: its name → the parts.
SERVED_AS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

# Attention whose queries take in something else than its keys and values, so that no layer can be all three.
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention")
# Model types whose fused expert weights have gate and up in turns rather than one after the other.
INTERLEAVED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter"})
# Model types whose experts PEFT 0.19 and later treats the other way round, since they are flagged as (in, out).
FLAGGED_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
# Model types whose experts are on disk in either of two orientations.
TWO_WAY_EXPERTS = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
# What configs call the number of experts.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
