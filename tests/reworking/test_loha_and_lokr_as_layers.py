"""LoHa and LoKr are resized, combined and compared as the LoRA that they are; the oracle is their formula in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion_models
import pytest
import role_formulas
import torch
from peft_files import save_peft
from role_formulas import random
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.adapter import StoredTensor
from loratool.algebra.updates.additive import LowRank
from loratool.errors import LoratoolError
from loratool.files.safefile import read_safefile
from loratool.layouts.diffusion.kernels import kernel_of
from loratool.reworking.converting.forms import check_baked

TARGET = "model.layers.0.self_attn.q_proj"


def written(folder: Path, kind: str, roles: Mapping[str, Tensor], module: str = TARGET, **config: Any) -> Path:
    """An adapter as PEFT saves it."""
    tensors = {f"base_model.model.{module}.{role}": tensor for role, tensor in roles.items()}
    return save_peft(folder, tensors, **{"peft_type": kind, "target_modules": [module.rpartition(".")[2]], **config})


HADA = {
    "hada_w1_a": random(12, 2, seed=1),
    "hada_w1_b": random(2, 10, seed=2),
    "hada_w2_a": random(12, 2, seed=3),
    "hada_w2_b": random(2, 10, seed=4),
}
W1, W1_A, W1_B = random(3, 2, seed=1), random(3, 1, seed=2), random(1, 2, seed=3)
W2, W2_A, W2_B = random(4, 5, seed=4), random(4, 2, seed=5), random(2, 5, seed=6)
CORE, T_A, T_B = random(2, 2, 3, 3), random(2, 4, seed=7), random(2, 5, seed=8)


def loha_change() -> Tensor:
    one = role_formulas.product_of(HADA["hada_w1_a"], HADA["hada_w1_b"])
    return one * role_formulas.product_of(HADA["hada_w2_a"], HADA["hada_w2_b"])


# kind, tensors, α, ΔW, the rank of its exact LoRA
CASES: dict[str, tuple[str, dict[str, Tensor], float, Tensor, int]] = {
    "LoHa": ("LOHA", HADA, 1.0, 0.5 * loha_change(), 4),
    "LoKr": (
        "LOKR",
        {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B},
        1.0,
        role_formulas.kronecker(W1, role_formulas.product_of(W2_A, W2_B), 0.5),
        4,
    ),
    "LoKr of two products": (
        "LOKR",
        {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2_a": W2_A[:, :1].clone(), "lokr_w2_b": W2_B[:1].clone()},
        0.5,
        role_formulas.kronecker(
            role_formulas.product_of(W1_A, W1_B), role_formulas.product_of(W2_A[:, :1], W2_B[:1]), 0.5
        ),
        1,
    ),
    "whole LoKr": ("LOKR", {"lokr_w1": W1, "lokr_w2": W2}, 2.0, role_formulas.kronecker(W1, W2, 1.0), 8),
    "whole LoKr of wide factors": (
        "LOKR",
        {"lokr_w1": W1.T.contiguous(), "lokr_w2": W2},
        2.0,
        role_formulas.kronecker(W1.T, W2, 1.0),
        8,
    ),
    "LoKr with a core": (
        "LOKR",
        {"lokr_w1": W1, "lokr_t2": CORE, "lokr_w2_a": T_A, "lokr_w2_b": T_B},
        1.0,
        role_formulas.kronecker(W1, role_formulas.tucker(CORE, T_A, T_B), 0.5).flatten(1),
        4,
    ),
}


def rank_in(roles: Mapping[str, Tensor]) -> int:
    """That of the factors that are products; any other number where there are none."""
    return next((tensor.shape[0] for role, tensor in roles.items() if role.endswith("_b")), 2)


def product_in(folder: Path) -> Tensor:
    """ΔW of the one layer of plain LoRA, in float64."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    assert config["peft_type"] == "LORA"
    down, up = (next(t for name, t in tensors.items() if f"lora_{side}" in name).double() for side in "AB")
    scale: float = config["lora_alpha"] / config["r"]
    return scale * up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize("case", CASES)
def test_its_rank_as_lora_is_enough_for_all_of_it(case: str, tmp_path: Path) -> None:
    kind, roles, alpha, change, rank = CASES[case]
    adapter = written(tmp_path / "in", kind, roles, r=rank_in(roles), alpha=alpha)
    report = loratool.resize(adapter, tmp_path / "out", energy=1.0, dtype="float32")
    found = product_in(tmp_path / "out")
    torch.testing.assert_close(found, change.flatten(1), rtol=1e-5, atol=1e-5)
    assert max(module.rank for module in report.modules.values()) <= rank


@pytest.mark.parametrize("case", CASES)
def test_a_smaller_rank_is_its_best_approximation(case: str, tmp_path: Path) -> None:
    kind, roles, alpha, change, _ = CASES[case]
    adapter = written(tmp_path / "in", kind, roles, r=rank_in(roles), alpha=alpha)
    loratool.resize(adapter, tmp_path / "out", rank=1, dtype="float32")
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    torch.testing.assert_close(product_in(tmp_path / "out"), s[0] * torch.outer(u[:, 0], v[0]), rtol=1e-5, atol=1e-5)


def test_they_are_combined_with_lora_and_compared(tmp_path: Path) -> None:
    """The sum of LoHa, LoKr and LoRA of one layer is that of their products."""
    kind, roles, alpha, whole, _ = CASES["LoKr"]
    lokr = written(tmp_path / "lokr", kind, roles, r=2, alpha=alpha)
    down, up = random(1, 10), random(12, 1)
    lora = written(tmp_path / "lora", "LORA", {"lora_A.weight": down, "lora_B.weight": up}, r=1, lora_alpha=1)
    loha = written(tmp_path / "loha", "LOHA", HADA, r=2, alpha=1.0)
    report = loratool.combine([loha, lokr, lora], tmp_path / "out", method="cat", dtype="float32")
    wanted = 0.5 * loha_change() + whole + role_formulas.product_of(up, down)
    torch.testing.assert_close(product_in(tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)
    assert "taken-as-lora" in [note.code for note in report.notes]
    (pairs,) = loratool.compare([loha, lokr]).modules.values()
    (found,) = pairs.values()
    inner = float((0.5 * loha_change() * whole).sum() / (0.5 * loha_change().norm() * whole.norm()))
    assert found.cosine == pytest.approx(inner, abs=1e-6)


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def convolution(path: Path, module: str = CONV) -> Tensor:
    """LoKr of a 3 × 3 convolution of 10 channels, whose second factor is a product; ΔW as a matrix."""
    w1, a, b = random(3, 2, seed=1), random(4, 1, seed=2), random(1, 5 * 9, seed=3)
    tensors = {f"{module}.lokr_w1": w1, f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b}
    save_file({**tensors, f"{module}.alpha": torch.tensor(1.0)}, path)
    return role_formulas.kronecker(w1, role_formulas.product_of(a, b), 1.0)


def test_the_name_of_a_layer_tells_that_it_is_a_convolution(tmp_path: Path) -> None:
    delta = convolution(tmp_path / "lokr.safetensors")
    report = loratool.resize(tmp_path / "lokr.safetensors", tmp_path / "lora.safetensors", rank=2)
    codes = [note.code for note in report.notes]
    assert "layer-kind-unknown" not in codes
    assert "larger-than-before" in codes  # 2 · (12 + 90) numbers, and it had 6 + 4 + 45
    found = load_file(tmp_path / "lora.safetensors")
    up, down, alpha = (found[f"{CONV}.{role}"] for role in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert (down.shape, up.shape) == ((2, 10, 3, 3), (12, 2, 1, 1))
    product = alpha.double() / 2 * up.flatten(1).double() @ down.flatten(1).double()
    torch.testing.assert_close(product, delta, rtol=1e-5, atol=1e-5)


def test_a_base_tells_that_a_layer_is_a_convolution_where_its_name_does_not(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    w1, a, b = random(3, 2, seed=1), random(4, 1, seed=2), random(1, 5, seed=3)
    tensors = {f"{module}.lokr_w1": w1, f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b}
    save_file({**tensors, f"{module}.alpha": torch.tensor(1.0)}, tmp_path / "lokr.safetensors")
    weights = {
        "mid_block.attentions.0.proj_in.weight": random(12, 10, 1, 1),
        "mid_block.resnets.0.conv1.weight": random(9),
    }
    more = {"down_blocks.0.resnets.0.conv1.weight": random(4, 4, 3, 3)}
    save_file(weights | more, tmp_path / "unet.safetensors")
    for base, kernel in ((None, ()), (tmp_path / "unet.safetensors", (1, 1))):
        out = tmp_path / f"{base is None}.safetensors"
        report = loratool.convert(tmp_path / "lokr.safetensors", out, to="kohya", base=base)
        assert ("layer-kind-unknown" in [note.code for note in report.notes]) == (base is None)
        assert load_file(out)[f"{module}.lora_down.weight"].shape[2:] == kernel


@pytest.mark.parametrize("model", ["sd15_file", "sdxl_file", "bfl_flux", "sd3", "wan", "lumina", "open_clip", "t5"])
def test_kernels_that_names_tell_are_those_of_the_weights(model: str) -> None:
    found = {
        name: kernel
        for name, shape in getattr(diffusion_models, model)().items()
        if len(shape) > 1 and (kernel := kernel_of(name.removesuffix(".weight"))) is not None and kernel != shape[2:]
    }
    assert found == {}


@pytest.mark.parametrize("row", [None, 0, 599])
def test_lora_that_is_another_update_is_found_in_any_row(row: int | None, tmp_path: Path) -> None:
    """Before LoKr is written as LoRA, both are worked out by blocks of rows: one wrong number anywhere is an error."""
    up, down = random(600, 4, seed=1), random(4, 600, seed=2)
    save_file({"up": up.contiguous(), "down": down.contiguous()}, tmp_path / "right.safetensors")
    if row is not None:
        up[row, 0] += 1e-3
    save_file({"up": up.contiguous(), "down": down.contiguous()}, tmp_path / "made.safetensors")
    right, made = (
        {name: StoredTensor(file, info) for name, info in file.tensors.items()}
        for file in (read_safefile(tmp_path / f"{name}.safetensors") for name in ("right", "made"))
    )
    kind: Any = LowRank
    before, after = (SimpleNamespace(updates={"w": kind(each["up"], each["down"], 0.5)}) for each in (right, made))
    if row is None:
        check_baked(before, after, "w")  # type: ignore[arg-type]  # all that it looks at
        return
    with pytest.raises(LoratoolError, match="w as LoRA is another update"):
        check_baked(before, after, "w")  # type: ignore[arg-type]  # the same
