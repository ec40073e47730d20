"""Layers that another dialect only names otherwise: their bytes are copied, nothing is computed, and torch is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratool.adapters.adapter import FACTOR_NAMES, StoredTensor
from loratool.adapters.formats.format import Spelling
from loratool.adapters.layers import Contents, Form, Layer
from loratool.adapters.writer import Copied
from loratool.algebra.updates.additive import LowRank
from loratool.reworking.converting.rows import Target


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
