"""Packed weights: how each kind of quantised checkpoint is read. A kind is one module with one entry in `CODECS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from loratool.bases.codecs.awq import Awq
from loratool.bases.codecs.bitsandbytes import BitsAndBytes
from loratool.bases.codecs.compressed_tensors import CompressedTensors
from loratool.bases.codecs.fp8 import Fp8
from loratool.bases.codecs.fp8_files import Fp8Files
from loratool.bases.codecs.gguf import Gguf
from loratool.bases.codecs.gptq import Gptq
from loratool.bases.codecs.hqq import HqqCodec
from loratool.bases.codecs.modelopt import ModelOpt
from loratool.bases.codecs.mxfp4 import Mxfp4
from loratool.bases.codecs.quanto import Quanto
from loratool.bases.codecs.torchao import TorchAo
from loratool.bases.codecs.unreadable import Unreadable
from loratool.bases.decoded import Decoded, PackedModel
from loratool.bases.packed import ENTRIES, TWINS, Codec, Setting, Settings
from loratool.files.checkpoint import Checkpoint
from loratool.files.inputs import read_json
from loratool.files.pipelines import Member, itself

CODECS: tuple[Codec, ...] = (
    Gguf(),
    Fp8(),
    BitsAndBytes(),
    Gptq(),
    Awq(),
    HqqCodec(),
    TorchAo(),
    CompressedTensors(),
    ModelOpt(),
    Mxfp4(),
    Quanto(),
    Unreadable(),
    Fp8Files(),
)


def decoded(base: Checkpoint) -> Checkpoint:
    """The base with its packed weights as plain ones; itself where no codec knows any of them.

    Raises `InputError` where a packed weight is incomplete.
    """
    models = tuple(filter(None, (quantised(model, prefix) for prefix, model in models_in(base))))
    if not models:
        return base
    own = {each.name: getattr(base, each.name) for each in fields(Checkpoint)}
    return Decoded(**own, models=models)


def quantised(model: Checkpoint, prefix: str) -> PackedModel | None:
    """A model with what a codec finds in it; None where none knows any of its weights."""
    settings = Settings(tuple(settings_in(model)))
    for codec in CODECS:
        if (packing := codec.find(model, settings)) is not None:
            return PackedModel(model, packing, codec, settings, prefix)
    return None


def models_in(base: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """A checkpoint, or the components of a pipeline, each with the prefix of its names there."""
    if not base.components:
        yield "", base
    for name, model in base.components.items():
        prefix = f"{name}."
        files = tuple(itself(shard) for shard in base.shards if isinstance(shard, Member) and shard.prefix == prefix)
        yield prefix, replace(model, shards=files)  # which may be ones that are still on the Hub


def settings_in(base: Checkpoint) -> Iterator[Setting]:
    """The places in which the config of one model says how its weights are packed."""
    for path in ENTRIES:
        values: Any = base.config
        for key in path:
            values = values.get(key) if isinstance(values, Mapping) else None
        if isinstance(values, Mapping):
            yield Setting("config.json", path, values)
    for name in TWINS:
        if name in base.side_files:
            yield Setting(name, (), read_json(base.root / name, repeated=True, lenient=True))
