"""A small model, an adapter on it, and merges of both by other tools' arithmetic, with faults planted one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_model
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file
from torch import Tensor

from loratool.results.verify import Diagnosis, Verification

HIDDEN, INNER, KEYS, TOKENS, LAYERS = 48, 80, 24, 64, 3
RANK, ALPHA = 5, 15.0  # of which √r, r, α, α/r and 1 over each are all different numbers
TARGETS: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
OTHERS: Mapping[str, tuple[int, ...]] = {
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """A base and an adapter on disk, and the same as tensors."""

    home: Path
    weights: Tensors
    factors: Mapping[str, tuple[Tensor, Tensor]]  # weight → A, B in float64

    @property
    def base(self) -> Path:
        return self.home / "base"

    @property
    def adapter(self) -> Path:
        return self.home / "adapter"

    def change(self, name: str, scale: float = ALPHA / RANK) -> Tensor:
        """ΔW in float64."""
        down, up = self.factors[name]
        return up @ down * scale

    def merged(self, how: Callable[[str, Tensor], Tensor] | None = None) -> Tensors:
        """The tensors of a merge; `how` gives those that are edited, by default the exact sum rounded once."""
        found = {name: value.clone() for name, value in self.weights.items()}
        for name in self.factors:
            weight = self.weights[name]
            found[name] = how(name, weight) if how else rounded(weight.double() + self.change(name), weight.dtype)
        return found

    def write(self, tensors: Tensors, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
        """A merged model as another tool writes it."""
        shutil.rmtree(folder, ignore_errors=True)
        own = {"torch_dtype": str(self.weights["model.norm.weight"].dtype).removeprefix("torch.")}
        return write_model(folder, tensors, {**CONFIG, **own, **(config or {})})


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 rounded once: to odd in float32 first, so that the second rounding cannot go wrong."""
    single = values.float()
    bits = single.view(torch.int32)
    toward_zero = torch.where(single.double().abs() > values.abs(), bits - 1, bits)
    odd = torch.where(single.double() == values, bits, toward_zero | 1)
    return odd.view(torch.float32).to(dtype) if dtype != torch.float32 else single


def write_model(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    return save_model(folder, tensors, config)


def write_adapter(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    modules = {name.removesuffix(".weight"): (up, down) for name, (down, up) in factors.items()}
    return save_peft(
        folder,
        named_by_peft(modules, dtype),
        **{"r": RANK, "lora_alpha": ALPHA, "target_modules": [name.rpartition(".")[2] for name in TARGETS], **settings},
    )


def scene(
    home: Path,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 0.2,
    factors: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> Scene:
    """A base in one dtype and an adapter with random factors in another; `size` is that of ΔW relative to W."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights: Tensors = {"model.embed_tokens.weight": normal(TOKENS, HIDDEN).to(dtype)}
    for layer in range(LAYERS):
        for part, shape in {**TARGETS, **OTHERS}.items():
            weights[f"model.layers.{layer}.{part}.weight"] = (normal(*shape) * 0.05).to(dtype)
    weights["model.norm.weight"] = (1 + normal(HIDDEN) * 0.1).to(dtype)
    made = {}
    for name in weights:
        part = name.removesuffix(".weight").partition("layers.")[2][2:]
        if part in TARGETS:
            rows, columns = TARGETS[part]
            each = size * 0.05 / (ALPHA / RANK) / RANK**0.5
            made[name] = normal(RANK, columns).double(), (normal(rows, RANK) * each).double()
    write_model(home / "base", weights, {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_adapter(home / "adapter", made, factors, **settings)
    stored = load_file(home / "adapter" / "adapter_model.safetensors")
    exact = {}
    for name in made:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        exact[name] = tuple(stored[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
    return Scene(home, weights, exact)  # type: ignore[arg-type]


def codes(found: Verification) -> list[str]:
    return [each.code for each in found.diagnoses]


def only(found: Verification) -> Diagnosis:
    """The one diagnosis of a model that is not proven."""
    assert (found.verdict, found.exit_code) == ("not-proven", 5), str(found)
    assert len(found.diagnoses) == 1, str(found)
    return found.diagnoses[0]
