"""What the tensors of a module do to its weight, each formula written out element by element in float64."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor


def lora(up: Tensor, down: Tensor, scale: float, mid: Tensor | None = None) -> Tensor:
    """ΔW of LoRA: as a convolution of kernels where `down` or `mid` has one, (out, in, *kernel)."""
    up, down = up.double().flatten(1), down.double()
    rank = up.shape[1]
    if mid is not None:
        wide, down = mid.double(), down.flatten(1)
        kernel = wide.shape[2:]
        change = torch.zeros(up.shape[0], down.shape[1], *kernel, dtype=torch.float64)
        for o, i, a, b in product(*map(range, change.shape[:2]), range(rank), range(down.shape[0])):
            change[o, i] += scale * up[o, a] * wide[a, b] * down[b, i]
        return change
    change = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for o, i, a in product(range(up.shape[0]), range(down.shape[1]), range(rank)):
        change[o, i] += scale * up[o, a] * down[a, i]
    return change


def dora(weight: Tensor, change: Tensor, lengths: Tensor, by_column: bool) -> Tensor:
    """W' of DoRA: every row of W + ΔW, or everything of one input channel, at its length."""
    moved = (weight + change).double()
    result = moved.clone()
    for at, length in enumerate(lengths.flatten().tolist()):
        part = moved[:, at] if by_column else moved[at]
        norm = math.sqrt(sum(x * x for x in part.flatten().tolist()))
        if by_column:
            result[:, at] = part * (length / norm)
        else:
            result[at] = part * (length / norm)
    return result
