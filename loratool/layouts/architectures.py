"""Facts about model families that neither shapes nor names on disk can tell."""

from __future__ import annotations

# Model types whose linear layers are Conv1D, with W stored (in, out), and what those layers are called.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

# Modules that hold the input embedding, and those that turn hidden states into logits.
INPUT_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "proj_out", "output_projection"})

# Parts of the class names of models that turn hidden states into token logits, so that a head may be tied.
GENERATIVE = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
