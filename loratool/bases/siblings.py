"""Weights that servers fuse into one when they load them, so that all must be packed or none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from loratool.layouts.fusions import SERVED_TOGETHER

EXPERT = re.compile(r"^(?P<layer>.+\.experts)\..+$")  # experts of a layer are one weight of a server
LEAVES = {name: group for group in SERVED_TOGETHER for name in group}


def served_with(touched: Iterable[str], packed: Collection[str]) -> frozenset[str]:
    """`touched`, and those of `packed` that a server fuses with one of them."""
    groups = {group_of(name) for name in touched}
    return frozenset(touched) | frozenset(name for name in packed if group_of(name) in groups)


def group_of(name: str) -> tuple[str, tuple[str, ...]]:
    """What the weights that are fused with one have in common: where they are, and what they are called."""
    if match := EXPERT.match(name):
        return match["layer"], ()
    above, _, leaf = name.removesuffix(".weight").rpartition(".")
    return above, LEAVES.get(leaf, (leaf,))
