"""How long packed weights take to reach a device decoded, next to plain ones of the same shape, which are only copied."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

LAYERS = ("q_proj", "gate_proj", "down_proj")  # of the first block
TURNS = 9  # after one that prepares everything


def times_of(folders: Mapping[str, Path], device: str) -> dict[str, float]:
    """Seconds for all rows of some weights of each model, reading included: the median of a few turns."""
    found: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(TURNS + 1):
        for name, folder in folders.items():
            found[name].append(once(folder, device))
    return {name: median(times[1:]) for name, times in found.items()}


def once(folder: Path, device: str) -> float:
    """Read all rows of some weights, a row block at a time, as a merge does; seconds until the device has them."""
    import torch

    from loratool.bases.codecs import decoded
    from loratool.bases.decoded import weight_of
    from loratool.bases.opening import open_checkpoint
    from loratool.bases.weights import Room
    from loratool.files.open_sources import OpenSources
    from loratool.files.safefile import FLOAT_NAMES
    from loratool.merging.resources import PACKED_CUDA_BLOCK

    base, place, cuda = decoded(open_checkpoint(folder)), torch.device(device), device.startswith("cuda")
    memory = torch.empty(PACKED_CUDA_BLOCK, dtype=torch.uint8, pin_memory=cuda)
    twin = torch.empty(PACKED_CUDA_BLOCK, dtype=torch.uint8, device=place) if cuda else None
    taken = 0.0
    for name in (name for name in base.tensors if ".layers.0." in name and name.split(".")[-2] in LAYERS):
        weight = weight_of(base, name)
        rows, width = weight.shape
        step = PACKED_CUDA_BLOCK // (4 * width)
        dtype = getattr(torch, FLOAT_NAMES[weight.exact])
        with OpenSources() as sources:
            room = Room(sources, memory, twin)
            started = time.perf_counter()
            for first in range(0, rows, step):
                weight.rows(first, min(step, rows - first), place, dtype, room)
            if cuda:
                torch.cuda.synchronize(place)
            taken += time.perf_counter() - started
    return taken
