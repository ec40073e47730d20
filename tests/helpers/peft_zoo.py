"""A small module with one layer of every kind that PEFT adapts, and adapters for it as PEFT saves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import save_model
from oracle import read_tensors
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratool

TOKENS = torch.tensor([[3, 1, 7, 7, 0, 11, 2], [5, 4, 9, 6, 8, 10, 1]])


class Zoo(nn.Module):
    """Token numbers in, numbers out, through every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.c_attn = Conv1D(24, 16)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.square = nn.Linear(24, 24, bias=False)
        self.conv1 = nn.Conv1d(24, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.conv3 = nn.Conv3d(4, 4, (1, 1, 3), padding=(0, 0, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.c_attn(self.norm(self.linear(self.embed(tokens))))
        x = self.square(self.attention(x, x, x)[0]).transpose(1, 2)
        x = torch.tanh(self.conv1(x))[..., None].expand(-1, -1, -1, 3)
        x = self.conv3(self.conv2(x)[..., None]).mean((-1, -2))
        result: Tensor = self.head(x.transpose(1, 2))
        return result


def make_zoo(seed: int = 0) -> Zoo:
    """The module with random weights; no bias and no norm is left at a constant, which would hide mistakes."""
    torch.manual_seed(seed)
    zoo = Zoo().eval()
    shake(zoo, seed, 0.2)
    return zoo


def shake(module: nn.Module, seed: int, size: float) -> None:
    """Move every parameter that is trained away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype))


@dataclass
class Pair:
    """A base and an adapter on disk, and what PEFT makes of them."""

    base: Path
    adapter: Path
    before: dict[str, Tensor]
    merged: dict[str, Tensor]  # by PEFT
    output: Tensor  # of the model with the adapter unmerged

    def merge(self, out: Path, **options: Any) -> dict[str, Tensor]:
        """The tensors of the model that loratool makes of the files."""
        loratool.merge(self.base, [self.adapter], out, **options)
        return read_tensors(out)


def save_base(folder: Path, model: nn.Module) -> Path:
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    return save_model(folder, tensors, {"model_type": "gpt2"})


def train(
    folder: Path,
    model: nn.Module,
    config: Any,
    inputs: Any = TOKENS,
    seed: int = 3,
    merge: Callable[[Any], nn.Module] | None = None,
) -> Pair:
    """Adapt `model` with PEFT, give what is trained random values, and save both."""
    base = save_base(folder / "base", model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(seed)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    shake(wrapped, seed, 0.1)
    wrapped.save_pretrained(folder / "adapter")
    with torch.inference_mode():
        output = wrapped(inputs).clone()
    merged = (merge(wrapped) if merge else wrapped.merge_and_unload()).state_dict()
    return Pair(base, folder / "adapter", before, {n: t.contiguous().clone() for n, t in merged.items()}, output)


def assert_merged_alike(found: Mapping[str, Tensor], pair: Pair, *edited: str) -> None:
    """`found` is what PEFT merges, and the `edited` tensors, and no others, are not the base's."""
    assert set(found) == set(pair.before)
    for name, wanted in pair.merged.items():
        off = (found[name] - wanted).abs().max()
        assert float(off) <= 1e-5, f"{name}: off by {float(off):.2g}"
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, pair.before[name])}
    assert changed == set(edited)


def output_of(found: Mapping[str, Tensor], model: nn.Module, inputs: Any = TOKENS) -> Tensor:
    """What `model` says with other weights."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(dict(found))
    with torch.inference_mode():
        result: Tensor = loaded.eval()(inputs)
    return result
