"""Blocks of GGUF that are decoded without the `gguf` package have the bits that the package decodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratool.bases.codecs.gguf_blocks import DECODERS, decoded
from loratool.layouts.ggml import TYPES

pytest.importorskip("gguf")
from gguf import quants


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, at scales that are not finite
@pytest.mark.parametrize("kind", DECODERS)
def test_blocks_have_the_bits_that_the_package_decodes(kind: str) -> None:
    """Random bytes are blocks of any type, with scales of all sizes, subnormal, infinite and NaN ones among them."""
    raw = np.random.default_rng(5).integers(0, 256, (4000, TYPES[kind].nbytes), dtype=np.uint8)
    wanted = torch.from_numpy(quants.dequantize(raw, quants.GGMLQuantizationType[kind]).reshape(-1))
    found = decoded(torch.from_numpy(raw.reshape(-1)), kind)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert wanted.isnan().any()
    bits, wanted_bits = (each.nan_to_num(0.0).view(torch.int32) for each in (found, wanted))
    assert torch.equal(bits, wanted_bits)
