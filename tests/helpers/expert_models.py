"""Models whose experts are parameters of one tensor each, as `target_parameters` adapts them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HIDDEN, MIDDLE, EXPERTS = 6, 5, 4


INPUTS = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Parameters of all experts in one tensor each, registered in the order of `sizes`."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], transposed: bool) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """Anything that every parameter has a part in."""
        return x * sum(parameter.sin().mean() for _, parameter in self.named_parameters())


class Block(nn.Module):
    def __init__(self, sizes: Mapping[str, tuple[int, ...]], transposed: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts(sizes, transposed)
        self.q_proj = nn.Linear(HIDDEN, HIDDEN + 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.q_proj(self.experts(x) * self.gate(x).mean())
        return result


class Layers(nn.Module):
    def __init__(self, sizes: Mapping[str, tuple[int, ...]], transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(sizes, transposed) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers[0](x) + self.layers[1](x)
        return result


FUSED = {"gate_up_proj": (EXPERTS, 2 * MIDDLE, HIDDEN), "down_proj": (EXPERTS, HIDDEN, MIDDLE)}


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
