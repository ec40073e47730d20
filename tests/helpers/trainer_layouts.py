"""What adapters of LLM trainers mean: ΔW in float64 from their tensors, by the formulas of the trainers' own code.

Row by row and head by head, so that nothing here is shared with a reader that works on whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_model
from safetensors.torch import load_file
from torch import Tensor

HIDDEN, WIDE, TOKENS, HEADS, KEY_HEADS, WIDTH = 8, 12, 10, 4, 2, 4
RANK = 2
LAYERS = 2


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape))) / 4


def shapes() -> dict[str, tuple[int, int]]:
    """The matrices of a small Llama with grouped queries, by module."""
    found = {"model.embed_tokens": (TOKENS, HIDDEN), "lm_head": (TOKENS, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        found |= {
            f"{start}.self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
            f"{start}.self_attn.k_proj": (KEY_HEADS * WIDTH, HIDDEN),
            f"{start}.self_attn.v_proj": (KEY_HEADS * WIDTH, HIDDEN),
            f"{start}.self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
            f"{start}.mlp.gate_proj": (WIDE, HIDDEN),
            f"{start}.mlp.up_proj": (WIDE, HIDDEN),
            f"{start}.mlp.down_proj": (HIDDEN, WIDE),
        }
    return found


def config(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": WIDTH,
        "hidden_size": HIDDEN,
        "tie_word_embeddings": False,
        **more,
    }


def write_base(folder: Path, **more: Any) -> Path:
    """The model, with the settings `more` in its config; a setting of None is left out."""
    return save_model(
        folder,
        {f"{m}.weight": numbers(*s, seed=n + 1) for n, (m, s) in enumerate(shapes().items())},
        {name: value for name, value in config(**more).items() if value is not None},
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model by module, in float64."""
    return {n.removesuffix(".weight"): t.double() for n, t in load_file(folder / "model.safetensors").items()}


def check_merged(folder: Path, base: Path, deltas: Mapping[str, Tensor]) -> None:
    """Every weight of a merge is the exact sum rounded once, and those without an update have the base's bytes."""
    found, before = load_file(folder / "model.safetensors"), weights(base)
    assert deltas.keys() <= before.keys()
    assert found.keys() == {f"{module}.weight" for module in before}
    for module, weight in before.items():
        wanted = (weight + deltas[module] if module in deltas else weight).float()
        assert torch.equal(found[f"{module}.weight"], wanted), module


def product(b: Tensor, a: Tensor, scale: float) -> Tensor:
    return scale * (b.double() @ a.double())


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Each head's rows 0, 2, 4, … before 1, 3, 5, …: from Meta's rotary positions to those of transformers."""
    width = rows.shape[0] // heads
    order = [head * width + at for head in range(heads) for at in (*range(0, width, 2), *range(1, width, 2))]
    return rows[order]


def rows_of_groups(rows: Tensor, heads: int, key_heads: int, part: str) -> Tensor:
    """The rows of "q", "k" or "v", where each group lies as its heads of queries, a head of keys and one of values."""
    each = heads // key_heads
    width = rows.shape[0] // (heads + 2 * key_heads)
    order: list[int] = []
    for group in range(key_heads):
        start = group * (each + 2)
        chosen: Sequence[int] = {"q": range(start, start + each), "k": [start + each], "v": [start + each + 1]}[part]
        order += [head * width + row for head in chosen for row in range(width)]
    return rows[order]
