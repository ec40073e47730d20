"""LoHa and LoKr in a dialect that has them: the same tensors under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapters.adapter import Adapter, Derived, StoredTensor, fields_of, same_values
from loratool.adapters.formats import NAMED
from loratool.adapters.formats.format import Spelling
from loratool.adapters.formats.roles.names import canonical, split
from loratool.adapters.layers import Layer
from loratool.adapters.writer import Carried
from loratool.algebra.updates.base import Update
from loratool.reworking.converting.rows import Target

DIALECTS = ("lycoris", "comfy")  # that have them


def can_keep(adapter: Adapter, dialect: str) -> bool:
    """Whether tensors of an adapter mean the same in a dialect: both have LyCORIS's roles and α."""
    return dialect in DIALECTS and adapter.format == NAMED.name


def kept(targets: Mapping[str, Target], kinds: Mapping[str, str], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers of the output that are LoHa or LoKr → of the input; not those that are joined or cut."""
    whole = {name: target.sources[0] for name, target in targets.items() if target.is_whole(layers)}
    return {name: source for name, source in whole.items() if source in kinds}


def carry(carried: Carried, adapter: Adapter, names: Spelling, kept: Mapping[str, str]) -> None:
    """Add the tensors of these layers, each under the name of its role."""
    for name, source in kept.items():
        module = names.factors(name)[0].rpartition(".lora_")[0]
        for tensor in adapter.sources[source]:
            parts = split(tensor)
            assert parts is not None, "it was read by its role"
            stored = StoredTensor(adapter.file, adapter.file.tensors[tensor])
            carried.tensors[f"{module}.{canonical(parts[1])}"] = stored


def is_same(one: Any, other: Any) -> bool:
    """Whether two updates, or parts of such, are made of the same values in the same way."""
    if type(one) is not type(other):
        return False
    if isinstance(one, StoredTensor):
        return same_values(one, other)
    if isinstance(one, Derived):
        pairs = zip(one.parts, other.parts, strict=False)
        return one.shape == other.shape and len(one.parts) == len(other.parts) and all(is_same(*pair) for pair in pairs)
    if isinstance(one, Update):
        own, theirs = fields_of(one), fields_of(other)
        return own.keys() == theirs.keys() and all(is_same(own[key], theirs[key]) for key in own)
    return bool(one == other)
