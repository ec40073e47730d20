"""Packed weights: how quantised checkpoints are read. `known` lists the kinds, each a module of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.bases.packing_settings import Settings, settings_in
from loratool.files.checkpoint import Checkpoint
from loratool.files.pipelines import Member, itself
from loratool.files.safefile import FLOAT_NAMES

if TYPE_CHECKING:
    from loratool.bases.decoded import Decoded, PackedModel

PLAIN_ENDS = (".weight", ".bias")  # of names that no part of a packed weight has beside its values


def decoded(base: Checkpoint) -> Checkpoint:
    """The base with its packed weights as plain ones; itself where no codec knows any of them.

    Raises `InputError` where a packed weight is incomplete.
    """
    models = tuple(filter(None, (quantised(model, prefix) for prefix, model in models_in(base))))
    if not models:
        return base
    from loratool.bases.decoded import Decoded

    return base.seen_as(Decoded, models=models)


def as_decoded(base: Checkpoint) -> Decoded | None:
    """The base as one that `decoded` gave; None where all its weights are plain, for which nothing is imported."""
    if type(base) is Checkpoint:
        return None
    from loratool.bases.decoded import Decoded

    return base if isinstance(base, Decoded) else None


def quantised(model: Checkpoint, prefix: str) -> PackedModel | None:
    """A model with what a codec finds in it; None where none knows any of its weights."""
    settings = Settings(tuple(settings_in(model)))
    if not settings.places and is_plain(model):
        return None  # and no codec is imported
    from loratool.bases.codecs.known import CODECS
    from loratool.bases.decoded import PackedModel

    for codec in CODECS:
        if (packing := codec.find(model, settings)) is not None:
            return PackedModel(model, packing, codec, settings, prefix)
    return None


def is_plain(model: Checkpoint) -> bool:
    """Whether nothing in the files of a model can be a part of a packed weight.

    Packed values are of other dtypes than plain ones, what is stored beside them has names of its own, and some tools
    describe it in the headers.
    """
    return all((shard.layout.metadata or {}).keys() <= {"format"} for shard in model.shards) and all(
        info.dtype in FLOAT_NAMES and name.endswith(PLAIN_ENDS) for name, info in model.tensors.items()
    )


def models_in(base: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """A checkpoint, or the components of a pipeline, each with the prefix of its names there."""
    if not base.components:
        yield "", base
    for name, model in base.components.items():
        prefix = f"{name}."
        files = tuple(itself(shard) for shard in base.shards if isinstance(shard, Member) and shard.prefix == prefix)
        yield prefix, replace(model, shards=files)  # which may be ones that are still on the Hub
