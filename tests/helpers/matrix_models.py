"""The architectures of the matrix: tiny, with random weights, adapted by PEFT and saved in every layout that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import loaded_whole, randomise

HIDDEN, MLP, EXPERT_MLP, LAYERS, HEADS, GROUPS, HEAD, VOCABULARY, EXPERTS = 32, 48, 24, 2, 4, 2, 8, 96, 4
RANK, ALPHA = 4, 6.0
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }


def vision(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 16,
        "patch_size": 4,
        **changes,
    }


def blocks(**changes: Any) -> dict[str, Any]:
    """The vision tower of the Qwen family."""
    return {"depth": LAYERS, "hidden_size": HIDDEN, "num_heads": HEADS, "patch_size": 4, **changes}


def experts_of(container: str) -> list[str]:
    return [f"{container}.gate_up_proj", f"{container}.down_proj"]


@dataclass(frozen=True)
class Architecture:
    config: Callable[[], Any]
    model: str  # the class of transformers
    targets: Mapping[str, Any]  # arguments of LoraConfig
    edited: int  # tensors on disk that the adapter changes

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.model)


ARCHITECTURES: Mapping[str, Architecture] = {
    "mixtral": Architecture(
        lambda: transformers.MixtralConfig(**text(num_local_experts=EXPERTS)),
        "MixtralForCausalLM",
        {"target_modules": ATTENTION, "target_parameters": [*experts_of("mlp.experts"), "mlp.gate.weight"]},
        LAYERS * (4 + 1 + 3 * EXPERTS),
    ),
    "qwen3_moe": Architecture(  # its first layer is dense
        lambda: transformers.Qwen3MoeConfig(
            **text(moe_intermediate_size=EXPERT_MLP, num_experts=EXPERTS, head_dim=HEAD, mlp_only_layers=[0])
        ),
        "Qwen3MoeForCausalLM",
        {"target_modules": ATTENTION, "target_parameters": experts_of("mlp.experts")},
        LAYERS * 4 + 3 * EXPERTS,
    ),
    "qwen2_moe": Architecture(
        lambda: transformers.Qwen2MoeConfig(
            **text(moe_intermediate_size=EXPERT_MLP, shared_expert_intermediate_size=40, num_experts=EXPERTS)
        ),
        "Qwen2MoeForCausalLM",
        {"target_modules": ["q_proj", "shared_expert.gate_proj"], "target_parameters": experts_of("mlp.experts")},
        LAYERS * (2 + 3 * EXPERTS),
    ),
    "deepseek_v3": Architecture(
        lambda: transformers.DeepseekV3Config(
            **text(num_key_value_heads=HEADS, moe_intermediate_size=EXPERT_MLP, n_routed_experts=EXPERTS),
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "DeepseekV3ForCausalLM",
        {"target_modules": ["q_a_proj", "kv_b_proj"], "target_parameters": experts_of("mlp.experts")},
        LAYERS * 2 + 3 * EXPERTS,
    ),
    "gpt_oss": Architecture(  # its down_proj is square, as that of gpt-oss-20b
        lambda: transformers.GptOssConfig(**text(intermediate_size=HIDDEN, num_local_experts=EXPERTS, head_dim=HEAD)),
        "GptOssForCausalLM",
        {"target_modules": ATTENTION, "target_parameters": [*experts_of("mlp.experts"), "mlp.router.weight"]},
        LAYERS * (4 + 1 + 2),
    ),
    "granitemoe": Architecture(
        lambda: transformers.GraniteMoeConfig(**text(num_local_experts=EXPERTS)),
        "GraniteMoeForCausalLM",
        {"target_modules": ATTENTION, "target_parameters": experts_of("block_sparse_moe.experts")},
        LAYERS * (4 + 2),
    ),
    "llama4": Architecture(
        lambda: transformers.Llama4TextConfig(
            **text(intermediate_size_mlp=40, num_local_experts=EXPERTS, head_dim=HEAD, interleave_moe_layer_step=1)
        ),
        "Llama4ForCausalLM",
        {"target_modules": ATTENTION, "target_parameters": experts_of("feed_forward.experts")},
        LAYERS * (4 + 2),
    ),
    "llava": Architecture(
        lambda: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision()),
            text_config=transformers.LlamaConfig(**text()),
            image_token_index=VOCABULARY - 1,
        ),
        "LlavaForConditionalGeneration",
        {"target_modules": ["q_proj", "v_proj", "linear_1", "fc1"]},
        LAYERS * 2 * 2 + 1 + LAYERS,
    ),
    "qwen2_vl": Architecture(
        lambda: transformers.Qwen2VLConfig(
            text_config=text(rope_parameters=ROPE),
            vision_config=blocks(embed_dim=HIDDEN, mlp_ratio=2),
            tie_word_embeddings=False,
        ),
        "Qwen2VLForConditionalGeneration",
        {"target_modules": [*ATTENTION, "qkv", "fc1", "lm_head"]},
        LAYERS * (4 + 2) + 1,
    ),
    "qwen3_vl_moe": Architecture(
        lambda: transformers.Qwen3VLMoeConfig(
            text_config=text(
                moe_intermediate_size=EXPERT_MLP, num_experts=EXPERTS, head_dim=HEAD, rope_parameters=ROPE
            ),
            vision_config=blocks(
                intermediate_size=MLP, out_hidden_size=HIDDEN, deepstack_visual_indexes=[0], num_position_embeddings=16
            ),
        ),
        "Qwen3VLMoeForConditionalGeneration",
        {"target_modules": [*ATTENTION, "qkv"], "target_parameters": experts_of("mlp.experts")},
        LAYERS * (4 + 1 + 2),
    ),
    "clip": Architecture(
        lambda: transformers.CLIPConfig(
            text_config={**text(projection_dim=16)}, vision_config=vision(projection_dim=16), projection_dim=16
        ),
        "CLIPModel",
        {"target_modules": ["q_proj", "fc1", "visual_projection"]},
        2 * LAYERS * 2 + 1,
    ),
    "clip text model": Architecture(
        lambda: transformers.CLIPTextConfig(**text(projection_dim=16)),
        "CLIPTextModel",
        {"target_modules": ["q_proj", "fc1"]},
        LAYERS * 2,
    ),
    "vit": Architecture(
        lambda: transformers.ViTConfig(**vision(num_labels=3)),
        "ViTForImageClassification",
        {"target_modules": ["q_proj", "o_proj", "fc2"], "modules_to_save": ["classifier"]},
        LAYERS * 3 + 2,
    ),
    "dinov2": Architecture(  # gate and up are one tensor on disk
        lambda: transformers.Dinov2Config(**vision(use_swiglu_ffn=True)),
        "Dinov2Model",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        LAYERS * 3,
    ),
    "gpt_neox": Architecture(
        lambda: transformers.GPTNeoXConfig(**text(num_key_value_heads=HEADS)),
        "GPTNeoXForCausalLM",
        {"target_modules": ["query_key_value", "lm_head"]},
        LAYERS + 1,
    ),
    "phi3": Architecture(
        lambda: transformers.Phi3Config(**text(pad_token_id=0)),
        "Phi3ForCausalLM",
        {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
        LAYERS * 3,
    ),
    "bare llama": Architecture(
        lambda: transformers.LlamaConfig(**text()), "LlamaModel", {"target_modules": ATTENTION}, LAYERS * 4
    ),
}


@dataclass(frozen=True)
class Trained:
    """A base in both layouts, an adapter of PEFT, and the result of PEFT's own merge in both layouts."""

    architecture: Architecture
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def base_in_memory(self) -> Path:
        return self.folder / "base-in-memory"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def by_peft(self) -> Path:
        return self.folder / "by-peft"

    @property
    def by_peft_in_memory(self) -> Path:
        return self.folder / "by-peft-in-memory"


def build(architecture: Architecture) -> Any:
    """The model, with nothing in it constant."""
    torch.manual_seed(11)
    model = architecture.cls(architecture.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_base(folder: Path, architecture: Architecture) -> Any:
    """Save the model as `base` and `base-in-memory`, and load it again as a user would."""
    model = build(architecture)
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base-in-memory", save_original_format=False)
    return load(architecture, folder / "base")


def load(architecture: Architecture, folder: Path) -> Any:
    return loaded_whole(architecture.cls, folder)


def adapt(model: Any, **settings: Any) -> Any:
    """`model` with an adapter whose every factor is random."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **settings})).eval()
    randomise(wrapped, 0)
    return wrapped


def train(folder: Path, architecture: Architecture, **settings: Any) -> Trained:
    wrapped = adapt(save_base(folder, architecture), **{**architecture.targets, **settings})
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder / "by-peft")
    merged.save_pretrained(folder / "by-peft-in-memory", save_original_format=False)
    return Trained(architecture, folder)


# a part of what recent releases of transformers call these in memory
IN_MEMORY = {"dinov2": ".q_proj.", "gpt_neox": "lm_head.", "granitemoe": ".experts.gate_up_proj"}


@cache
def why_not_here(name: str) -> str:
    """Why the installed transformers does not have what a case is about; empty where it has."""
    if part := IN_MEMORY.get(name):
        architecture = ARCHITECTURES[name]
        with torch.device("meta"):
            model = architecture.cls(architecture.config())
        if not any(part in parameter for parameter in model.state_dict()):
            return f"transformers {transformers.__version__} has no '{part}' in {name} in memory"
    return ""
