"""Modules of image models by the block that they are in, and how much of an update each block has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from loratool.layouts.diffusion.components import TEXT_WORDS
from loratool.results.text import columns

# Stacks of blocks in the order in which a model runs them, as both layouts call them; those in the middle of U-Nets are one.
STACKS = (
    *("input_blocks", "down_blocks", "middle_block", "mid_block", "output_blocks", "up_blocks", "double_blocks"),
    *("joint_blocks", "noise_refiner", "context_refiner", "transformer_blocks", "single_transformer_blocks"),
    *("single_blocks", "blocks", "layers"),
)
BLOCK = re.compile(rf"(?<![^._])(?:({'|'.join(STACKS)})[._](\d+)|(mid_block|middle_block))(?=[._])")
TEXT = re.compile(rf"({'|'.join(sorted(TEXT_WORDS, key=len, reverse=True))})[._]")
IMAGE = re.compile(r"(?:unet|prior|diffusion_model)[._]")
MIDDLE = ("mid_block", "middle_block")
OTHER = "other"
WIDTH = 32  # characters of the longest bar


def block_of(target: str) -> str:
    """`down_blocks.0` of a target with dots or without, the word for a text encoder, or `other`."""
    if match := TEXT.match(target):
        return match[1]
    if (found := BLOCK.search(target)) is None:
        return OTHER
    stack = found[3] or found[1]
    return stack if stack in MIDDLE else f"{stack}.{found[2]}"


def is_of_images(targets: Iterable[str]) -> bool:
    """Whether some target is one of an image model: by its component, or by blocks that models of language do not have."""
    own = STACKS[: STACKS.index("blocks")]
    return any(IMAGE.match(target) or block_of(target).startswith(own) for target in targets)


def shares(norms: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Block → its part of the sum of squares of all norms, and how many targets it has, in the order of the model."""
    total = math.fsum(norm**2 for norm in norms.values())
    parts: dict[str, list[float]] = {}
    for target, norm in norms.items():
        parts.setdefault(block_of(target), []).append(norm**2)
    return {
        block: (math.fsum(parts[block]) / total if total else 0.0, len(parts[block]))
        for block in sorted(parts, key=place)
    }


def place(block: str) -> tuple[int, str, int]:
    """Where a block is in the order of a model: text encoders first, what is in no block last."""
    stack, _, number = block.partition(".")
    if stack in STACKS:
        return STACKS.index(stack), "", int(number or 0)
    return (len(STACKS), "", 0) if block == OTHER else (-1, block, 0)


def bars(norms: Mapping[str, float]) -> str:
    """A bar for each block, as long as its part of the update."""
    found = shares(norms)
    most = max((part for part, _ in found.values()), default=0.0)
    rows = [
        [f"{100 * part:.1f} %", f"{block} ×{count}", "█" * round(WIDTH * part / most) if most else ""]
        for block, (part, count) in found.items()
    ]
    width = max((len(row[1]) for row in rows), default=0)
    return columns(["‖ΔW‖²", "block"], [[share, f"{name:<{width}}  {bar}".rstrip()] for share, name, bar in rows])
