"""The configs of widely used models, as far as the shapes of their weights depend on them.

Facts from the `config.json` of each repository, checked against the table of models in litgpt 0.5.13, and by their sums:
tests/layouts/test_presets.py compares the parameters with those that the Hub shows for the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLASSES = {  # model type → its class for causal language modelling
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclass(frozen=True)
class Preset:
    """One released model: its source and its sizes, in the order of the table below."""

    source: str  # the repository on the Hub whose config.json has these numbers
    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        """The numbers as a config.json has them."""
        return {"architectures": [CLASSES[self.model_type]], **vars(self)}


PRESETS: Mapping[str, Preset] = {
    "llama-2-7b": Preset("meta-llama/Llama-2-7b-hf", "llama", "float16", 32000, 4096, 11008, 32, 32, 32, 128),
    "llama-2-13b": Preset("meta-llama/Llama-2-13b-hf", "llama", "float16", 32000, 5120, 13824, 40, 40, 40, 128),
    "llama-2-70b": Preset("meta-llama/Llama-2-70b-hf", "llama", "float16", 32000, 8192, 28672, 80, 64, 8, 128),
    "llama-3.1-8b": Preset("meta-llama/Llama-3.1-8B", "llama", "bfloat16", 128256, 4096, 14336, 32, 32, 8, 128),
    "llama-3.1-70b": Preset("meta-llama/Llama-3.1-70B", "llama", "bfloat16", 128256, 8192, 28672, 80, 64, 8, 128),
    "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", "llama", "bfloat16", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": Preset("meta-llama/Llama-3.2-3B", "llama", "bfloat16", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "tinyllama-1.1b": Preset(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", "bfloat16", 32000, 2048, 5632, 22, 32, 4, 64
    ),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", "llama", "bfloat16", 49152, 576, 1536, 30, 9, 3, 64, True),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.1", "mistral", "bfloat16", 32000, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", "qwen2", "bfloat16", 151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B", "qwen2", "bfloat16", 152064, 3584, 18944, 28, 28, 4, 128),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", "qwen3", "bfloat16", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", "qwen3", "bfloat16", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", "qwen3", "bfloat16", 151936, 4096, 12288, 36, 32, 8, 128),
    "qwen3-32b": Preset("Qwen/Qwen3-32B", "qwen3", "bfloat16", 151936, 5120, 25600, 64, 64, 8, 128),
    "gemma-2-2b": Preset("google/gemma-2-2b", "gemma2", "float32", 256000, 2304, 9216, 26, 8, 4, 256, True),
    "gemma-2-9b": Preset("google/gemma-2-9b", "gemma2", "float32", 256000, 3584, 14336, 42, 16, 8, 256, True),
    "gemma-3-1b": Preset("google/gemma-3-1b-pt", "gemma3_text", "bfloat16", 262144, 1152, 6912, 26, 4, 1, 256, True),
    "phi-3-mini": Preset("microsoft/Phi-3-mini-4k-instruct", "phi3", "bfloat16", 32064, 3072, 8192, 32, 32, 32, 96),
    "phi-4": Preset("microsoft/phi-4", "phi3", "bfloat16", 100352, 5120, 17920, 40, 40, 10, 128),
}
