"""Packed weights: how each kind of quantised checkpoint is read. A kind is one module with one entry in `CODECS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
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
from loratool.bases.decoded import Decoded
from loratool.bases.packed import ENTRIES, TWINS, Codec, Setting, Settings
from loratool.files.checkpoint import Checkpoint
from loratool.files.inputs import read_json

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
    settings = Settings(tuple(settings_in(base)))
    for codec in CODECS:
        if (packing := codec.find(base, settings)) is not None:
            own = {each.name: getattr(base, each.name) for each in fields(Checkpoint)}
            return Decoded(**own, codec=codec, settings=settings, packing=packing)
    return base


def settings_in(base: Checkpoint) -> Iterator[Setting]:
    """The places in which a checkpoint says how its weights are packed."""
    for path in ENTRIES:
        values: Any = base.config
        for key in path:
            values = values.get(key) if isinstance(values, Mapping) else None
        if isinstance(values, Mapping):
            yield Setting("config.json", path, values)
    for name in TWINS:
        if name in base.side_files:
            yield Setting(name, (), read_json(base.root / name, repeated=True, lenient=True))
