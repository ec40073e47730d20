"""Factors in 8 bits, as kohya's tools save them with `--save_precision fp8_e4m3fn`: every number is what torch reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import numbers
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.formats.roles.module import of_e4m3

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
WEIGHT, MODULE = "unet.mid_block.attn.to_q.weight", "lora_unet_mid_block_attn_to_q"


def test_a_byte_is_the_number_that_torch_reads() -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    wanted = raw.view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(torch.tensor([of_e4m3(n) for n in range(256)]).double(), wanted, equal_nan=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file({WEIGHT: numbers(6, 4, seed=9)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def lora(path: Path, dtype: torch.dtype, alpha: bool = True) -> Tensor:
    """Factors and α in a dtype; ΔW of what it holds of them in float64."""
    down, up = numbers(2, 4).to(dtype), numbers(6, 2, seed=1).to(dtype)
    tensors = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up}
    save_file(tensors | ({f"{MODULE}.alpha": torch.tensor(1.0).to(dtype)} if alpha else {}), path)
    return (0.5 if alpha else 1.0) * up.double() @ down.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_eight_bits_are_merged_and_verified(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    delta = lora(tmp_path / "lora.safetensors", dtype)
    loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out.safetensors", device="cpu")
    wanted = (numbers(6, 4, seed=9).double() + delta).float()
    assert torch.equal(load_file(tmp_path / "out.safetensors")[WEIGHT], wanted)
    report = loratool.verify(
        tmp_path / "out.safetensors", base=base, adapters=[tmp_path / "lora.safetensors"], device="cpu"
    )
    assert report.passes


@pytest.mark.parametrize("dtype", DTYPES)
def test_resized_factors_are_written_in_the_sixteen_bits_that_hold_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """And what is only rescaled stays in its dtype, with another α."""
    delta = lora(tmp_path / "lora.safetensors", dtype)
    loratool.rescale(tmp_path / "lora.safetensors", tmp_path / "half.safetensors", scale=0.5)
    half = load_file(tmp_path / "half.safetensors")
    assert half[f"{MODULE}.lora_up.weight"].dtype is dtype
    assert half[f"{MODULE}.alpha"] == 0.5
    loratool.resize(tmp_path / "lora.safetensors", tmp_path / "same.safetensors", rank=2)
    same = load_file(tmp_path / "same.safetensors")
    up, down, alpha = (same[f"{MODULE}.{name}"] for name in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert up.dtype is torch.bfloat16
    torch.testing.assert_close(alpha.double() / 2 * up.double() @ down.double(), delta, rtol=0.02, atol=0.02)


def test_rotations_of_eight_bits_are_applied(base: Path, tmp_path: Path) -> None:
    """OFT of outputs, by the formula of LyCORIS in float64."""
    blocks = (numbers(3, 2, 2) / 4).to(torch.float8_e4m3fn)
    save_file({f"{MODULE}.oft_blocks": blocks, f"{MODULE}.alpha": torch.tensor(0.0)}, tmp_path / "oft.safetensors")
    loratool.merge(base, tmp_path / "oft.safetensors", tmp_path / "out.safetensors", device="cpu")
    skew = blocks.double() - blocks.double().mT
    turn = (torch.eye(2).double() + skew) @ torch.linalg.inv(torch.eye(2).double() - skew)
    rotated = turn.mT @ numbers(6, 4, seed=9).double().view(3, 2, 4)
    found = load_file(tmp_path / "out.safetensors")[WEIGHT].double()
    torch.testing.assert_close(found, rotated.reshape(6, 4), rtol=1e-5, atol=1e-6)


def test_values_of_eight_bits_are_looked_at(tmp_path: Path) -> None:
    down = numbers(2, 4)
    down[0, 0] = torch.nan
    tensors = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": numbers(6, 2)}
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, tmp_path / "lora.safetensors")
    facts = loratool.inspect(tmp_path / "lora.safetensors", check=True)
    assert "not-finite" in [finding.code for finding in facts.findings or ()]
