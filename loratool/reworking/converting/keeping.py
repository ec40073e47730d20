"""What another dialect only names otherwise: the same tensors.

Those of methods of LyCORIS, where the dialect has these; and factors, whose bytes are copied, so that nothing is computed
and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapters.adapter import FACTOR_NAMES, Adapter, Derived, StoredTensor, fields_of, same_values
from loratool.adapters.formats import NAMED
from loratool.adapters.formats.format import Spelling
from loratool.adapters.formats.roles.names import (
    ALPHA,
    GLORA,
    IA3,
    LORA,
    MAGNITUDES,
    OFT,
    SPARSE,
    canonical,
    split,
)
from loratool.adapters.layers import Contents, Form, Layer
from loratool.adapters.writer import Carried, Copied
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.errors import FitError, printable
from loratool.reworking.converting.rows import Target

DIALECTS = ("lycoris", "comfy")  # that have LoHa and LoKr
# What else their tools read as it is: roles of methods that are no product of two factors. ComfyUI limits rotations otherwise.
OTHERS: Mapping[str, frozenset[str]] = {
    "lycoris": frozenset((*IA3, *GLORA, *OFT, *SPARSE)),
    "comfy": frozenset(GLORA),
}
BESIDE = frozenset((ALPHA, *LORA, *MAGNITUDES))  # roles that go with them


def can_keep(adapter: Adapter, dialect: str) -> bool:
    """Whether tensors of an adapter mean the same in a dialect: both have LyCORIS's roles and α."""
    return dialect in DIALECTS and adapter.format == NAMED.name


def others_in(adapter: Adapter, dialect: str) -> dict[str, Update]:
    """Updates that are no product of two factors, whose tensors the dialect reads as they are."""
    found: dict[str, Update] = {}
    for target, update in adapter.updates.items() if can_keep(adapter, dialect) else ():
        roles = {role_of(name) for name in adapter.sources[target]}
        constrained = any(
            name.startswith("oft_") for name in adapter.sources[target]
        )  # kohya's, which take α otherwise
        if roles & OTHERS[dialect] and roles <= OTHERS[dialect] | BESIDE and not constrained:
            found[target] = update
    return found


def whole(targets: Mapping[str, Target], others: Mapping[str, Update]) -> dict[str, str]:
    """Targets of the output → those of the input that are kept; raises `FitError` where the dialect divides one of them."""
    found: dict[str, str] = {}
    for name, target in targets.items():
        (source, *more), parts = target.sources, target.experts[0]
        if source not in others:
            continue
        if more or len(parts) > 1 or parts[0].first or parts[0].count != others[source].shape[0]:
            raise FitError(
                f"{printable(source)}: its update ({type(others[source]).__name__}) cannot be split as the dialect "
                "splits its layer"
            )
        found[name] = source
    return found


def role_of(name: str) -> str:
    """The role of a tensor; (IA)³ has one that other methods' tensors end with too."""
    parts = split(name)
    return canonical(parts[1]) if parts else name.rpartition(".")[2]


def kept(targets: Mapping[str, Target], kinds: Mapping[str, str], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers of the output that are LoHa or LoKr → of the input; not those that are joined or cut."""
    whole = {name: target.sources[0] for name, target in targets.items() if target.is_whole(layers)}
    return {name: source for name, source in whole.items() if source in kinds}


def carry(carried: Carried, adapter: Adapter, names: Spelling, kept: Mapping[str, str]) -> None:
    """Add the tensors of these layers, each under the name of its role."""
    for name, source in kept.items():
        module = names.factors(name)[0].rpartition(".lora_")[0]
        for tensor in adapter.sources[source]:
            carried.tensors[f"{module}.{role_of(tensor)}"] = StoredTensor(adapter.file, adapter.file.tensors[tensor])


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


def only_low_rank(contents: Contents) -> bool:
    """Whether an adapter has nothing but factors: lengths, biases and what is stored in full may have to be computed."""
    others = (contents.biases, contents.saved, contents.bases, contents.rows, contents.changes)
    return not any(others) and not contents.dora


def may_be_copied(target: Target, layers: Mapping[str, Layer], dtype: str) -> bool:
    """Whether a layer of the output is one of the input whose factors lie row by row, in the dtype that is written."""
    if not target.is_whole(layers):
        return False
    layer = layers[target.sources[0]]
    return (
        layer.kind is target.kind
        and isinstance(layer.update, LowRank)
        and all(is_plain(f, dtype) for f in layer.factors)
    )


def is_plain(factor: object, dtype: str) -> bool:
    return isinstance(factor, StoredTensor) and not factor.transposed and FACTOR_NAMES.get(factor.info.dtype) == dtype


def copies(
    targets: Mapping[str, Target],
    layers: Mapping[str, Layer],
    forms: Mapping[str, Form],
    factors: Mapping[str, Mapping[str, float]],
    names: Spelling,
    dtype: str,
) -> Iterator[tuple[str, Copied]]:
    """Those layers of the output that are copied; `factors` are what the rows of each are multiplied by."""
    for name, target in targets.items():
        if not may_be_copied(target, layers, dtype) or not names.keeps(forms[name]):
            continue
        layer = layers[target.sources[0]]
        if factors[name][layer.target] == 1.0 and forms[name].rank == layer.rank:
            up, down = layer.factors
            yield name, Copied(name, layer.rank, (down, up))
