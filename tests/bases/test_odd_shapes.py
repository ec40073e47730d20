"""Quantised weights whose sides are no multiples of blocks and words: one row, 16 columns, odd numbers of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import nearest
from packed_affine import quanto, torchao
from packed_bnb import int8_of, nf4
from packed_hqq import hqq
from packed_models import open_packed, save_packed
from peft_files import save_peft
from quantised_models import FAMILIES, MATRICES, Quantised, ct_packed, fp8, gptq
from safetensors.torch import load_file

import loratool
from loratool.bases.weights import Room

NAME = "model.layers.0.mlp.down_proj.weight"
RANK = 2
KINDS: dict[str, Callable[..., Quantised]] = {
    **FAMILIES,
    **MATRICES,
    "nf4": nf4,
    "fp8 blocks larger than the weight": partial(fp8, block=(128, 128)),
    "int3 rows, zero points": partial(ct_packed, bits=3, group=None, symmetric=False),
    "GPTQ 3 bits, one group": partial(gptq, bits=3, group=-1, symmetric=False),
}
# whose blocks are whole rows or columns, so that any sizes will do
ANY_SIZES: dict[str, Callable[..., Quantised]] = {
    "bitsandbytes int8": int8_of,
    "torchao int8 rows": partial(torchao, kind="Int8Tensor"),
    "torchao FP8 rows": partial(torchao, kind="Float8Tensor"),
    "torchao int4 in bytes": partial(torchao, kind="IntxUnpackedToInt8Tensor", bits=4),
    "quanto int8 columns": partial(quanto, axis=1),
    "quanto FP8, one scale": partial(quanto, axis=None, fp8=True),
}
KINDS |= {
    **ANY_SIZES,
    "HQQ 8 bits, rows in turns": partial(hqq, packing="8bit_u8", group=32, axis=0),
    "HQQ 4 bits, rows in turns": partial(hqq, packing="4bit_u8", group=32, axis=0),
    "HQQ 3 bits, filled up": partial(hqq, packing="3bit_32", group=32, axis=1),
    "HQQ 2 bits, a group of several rows": partial(hqq, packing="2bit_u8", group=16, axis=1),
    "torchao int8 groups": partial(torchao, kind="Int8Tensor", columns=32),
}
# rows that words or bytes of a format hold together
EVEN = {"AWQ": 8, "modelopt int4": 2}


def shapes(kind: str) -> list[tuple[int, int]]:
    if kind in ANY_SIZES:
        return [(3, 17), (129, 63)]
    least = EVEN.get(kind, 1)
    return [(least, 64), (17 * least if least < 8 else 24, 96)]


@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in KINDS for shape in shapes(kind)])
def test_weights_of_odd_shapes_are_merged_and_packed_anew(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """By the values that the tests' own packing has, and as near to W + ΔW as that packing comes."""
    check(kind, shape, tmp_path)


def test_rows_that_are_packed_together_may_be_more_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 51 groups that take turns in rows of 96 values, 17 rows come together, here 3 kB where a block has 512 bytes."""
    monkeypatch.setattr("loratool.merging.resources.CPU_BLOCK", 512)
    check("HQQ 8 bits, rows in turns", (17, 96), tmp_path)


def check(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Merge and verify with one weight of a kind."""
    numbers = torch.Generator().manual_seed(0)
    made = KINDS[kind]({NAME: torch.randn(shape, generator=numbers) * 0.05})
    bias = {NAME.replace("weight", "bias"): torch.ones(shape[0]).bfloat16()}
    save_packed(tmp_path / "base", {**bias, **made.tensors}, made.config, made.metadata, tie_word_embeddings=False)
    for name, content in made.files.items():
        (tmp_path / "base" / name).write_text(json.dumps(content))
    up, down = torch.randn(shape[0], RANK, generator=numbers) / 4, torch.randn(RANK, shape[1], generator=numbers) / 4
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_peft(tmp_path / "adapter", tensors, r=RANK, lora_alpha=RANK)
    wanted = made.values[NAME].double() + up.double() @ down.double()
    inputs = tmp_path / "base", [tmp_path / "adapter"]
    loratool.merge(*inputs, tmp_path / "plain", device="cpu", dequantize=True)
    assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")[NAME], nearest(wanted, torch.bfloat16))
    loratool.merge(*inputs, tmp_path / "anew", device="cpu", requantize=True, accept_loss=True)
    packed = open_packed(tmp_path / "anew").weights[NAME]
    found = packed.rows(0, shape[0], torch.device("cpu"), torch.float64, Room())
    again = KINDS[kind]({NAME: wanted.float()}).values[NAME].double()
    assert (found - wanted).norm() <= 1.35 * (again - wanted).norm() + 1e-6
    assert loratool.verify(tmp_path / "anew", *inputs, device="cpu").exit_code == 0
