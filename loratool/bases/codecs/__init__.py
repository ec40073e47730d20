"""Packed weights: how each kind of quantised checkpoint is decoded. A kind is one module with one entry in `CODECS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from loratool.bases.codecs import fp8
from loratool.bases.weights import Decoded, StoredWeight
from loratool.files.checkpoint import Checkpoint

# What each kind finds in a checkpoint: the weights that it decodes, by the names of their plain copies.
CODECS: tuple[Callable[[Checkpoint], Mapping[str, StoredWeight]], ...] = (fp8.weights,)


def decoded(base: Checkpoint) -> Checkpoint:
    """The base with its packed weights as plain ones; itself where no codec knows any of them.

    Raises `InputError` where a packed weight is incomplete.
    """
    found = {name: weight for find in CODECS for name, weight in find(base).items()}
    if not found:
        return base
    return Decoded(**{each.name: getattr(base, each.name) for each in fields(Checkpoint)}, weights=found)
