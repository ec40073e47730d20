"""What a packed weight makes of all of its lines, packed as few as possible at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loratool.bases.packed import Requantizable


def in_pieces(weight: Requantizable, values: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What all lines are packed to, one after the other, and what these are decoded to."""
    packed, decoded = [], []
    for first in range(0, len(values), weight.together):
        lines = values[first : first + weight.together]
        packed.append(weight.encode(lines, first, parameters))
        decoded.append(weight.decode_packed(packed[-1], first, len(lines), parameters))
    return torch.cat(packed), torch.cat(decoded)
