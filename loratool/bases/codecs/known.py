"""The kinds of quantised checkpoints, in the order in which they are asked."""

from __future__ import annotations

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
from loratool.bases.packed import Codec

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
