"""Modules of image models by the block that they are in, and how much of an update each block has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from loratool.grouping import by_key
from loratool.layouts.diffusion import blocks
from loratool.layouts.diffusion.blocks import BASE, MID
from loratool.layouts.diffusion.words import TEXT_WORDS
from loratool.results.text import COLUMNS, room_for, table

TEXT = re.compile(rf"({'|'.join(sorted(TEXT_WORDS, key=len, reverse=True))})[._]")
IMAGE = re.compile(r"(?:unet|prior|diffusion_model)[._]")
ORDER = ("IN", MID, "OUT", "D", "S", "L", BASE)  # kinds of blocks as a model runs them; what is in no block is last
WIDTH = 32  # characters of the longest bar


def block_of(target: str) -> str:
    """The block of a target as --block-weights names it; of text encoders, which are all of its BASE, their word."""
    match = TEXT.match(target)
    return match[1] if match else blocks.block_of(target)


def kind_of(block: str) -> str:
    return block.rstrip("0123456789") if block[:1].isupper() else block


def is_of_images(targets: Iterable[str]) -> bool:
    """Whether some target is one of an image model: by its component, or by blocks that models of language do not have."""
    own = ORDER[: ORDER.index("L")]
    return any(IMAGE.match(target) or kind_of(block_of(target)) in own for target in targets)


def shares(norms: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """Block → its part of the sum of squares of all norms, and how many targets it has, in the order of the model."""
    total = math.fsum(norm**2 for norm in norms.values())
    parts = by_key((block_of(target), norm**2) for target, norm in norms.items())
    return {
        block: (math.fsum(parts[block]) / total if total else 0.0, len(parts[block]))
        for block in sorted(parts, key=place)
    }


def place(block: str) -> tuple[int, str]:
    """Where a block is in the order of a model: text encoders first, what is in no block last."""
    kind = kind_of(block)
    return (ORDER.index(kind) if kind in ORDER else -1), block


def bars(norms: Mapping[str, float]) -> str:
    """A bar for each block, as long as its part of the update."""
    found = shares(norms)
    most = max((part for part, _ in found.values()), default=0.0) or 1.0
    names = {block: f"{block} ×{count}" for block, (_, count) in found.items()}
    width = max(map(len, names.values()), default=0)
    longest = min(WIDTH, room_for(COLUMNS) - width - len("100.0 %") - 4)
    rows = [
        [f"{100 * part:.1f} %", f"{names[block]:<{width}}  {'█' * round(longest * part / most)}".rstrip()]
        for block, (part, _) in found.items()
    ]
    return table(["‖ΔW‖²", "block"], rows, room=COLUMNS)
