"""Whatever an update belongs to, each element is the exact sum rounded once: every element by rational numbers.

Embeddings, biases, experts of a stack with gate and up in one tensor, several adapters of one weight, one of them with
rsLoRA, modules saved whole, and differences in full; bases in the 16-bit dtypes and in float32.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from exactly import exact_products, nearest_value
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

WIDTH, VOCABULARY, EXPERTS, MIDDLE = 12, 10, 2, 4
LAYER = "model.layers.0"
QUERY, EMBEDDING, STACK = f"{LAYER}.self_attn.q_proj", "model.embed_tokens", f"{LAYER}.mlp.experts"
EXPERT = f"{STACK}.{{}}.{{}}_proj.weight"
RANK, ALPHA, STRENGTHS = 3, 7, (0.7, -1.3)  # scales that are no powers of two, and no decimal is exact
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Sums = dict[str, dict[tuple[int, ...], Fraction]]


def made(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def write_base(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A mixture of experts as it lies in files: one tensor for each expert's gate and up."""
    shapes = {
        f"{EMBEDDING}.weight": (VOCABULARY, WIDTH),
        f"{QUERY}.weight": (WIDTH, WIDTH),
        f"{QUERY}.bias": (WIDTH,),
        **{EXPERT.format(e, part): (MIDDLE, WIDTH) for e in range(EXPERTS) for part in ("gate", "up")},
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    tensors = {name: made(*shape, seed=n, size=0.02).to(dtype) for n, (name, shape) in enumerate(shapes.items())}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def write_adapters(folder: Path, stored: torch.dtype) -> dict[str, Tensor]:
    """One adapter of every kind of module, and one of the queries alone with rsLoRA; their tensors under short names."""
    factors = {
        "q.A": made(RANK, WIDTH, seed=20),
        "q.B": made(WIDTH, RANK, seed=21, size=0.01),
        "q.bias": made(WIDTH, seed=22, size=0.01),
        "e.A": made(RANK, VOCABULARY, seed=23),
        "e.B": made(WIDTH, RANK, seed=24, size=0.01),
        "x.A": made(RANK * EXPERTS, WIDTH, seed=25),
        "x.B": made(2 * MIDDLE, RANK * EXPERTS, seed=26, size=0.01),
        "head": made(VOCABULARY, WIDTH, seed=27),
        "r.A": made(RANK, WIDTH, seed=28),
        "r.B": made(WIDTH, RANK, seed=29, size=0.01),
    }
    factors = {name: tensor.to(stored) for name, tensor in factors.items()}
    names = {
        "q.A": f"{QUERY}.lora_A.weight",
        "q.B": f"{QUERY}.lora_B.weight",
        "q.bias": f"{QUERY}.lora_B.bias",
        "e.A": f"{EMBEDDING}.lora_embedding_A",
        "e.B": f"{EMBEDDING}.lora_embedding_B",
        "x.A": f"{STACK}.lora_A.weight",
        "x.B": f"{STACK}.lora_B.weight",
        "head": "lm_head.weight",
    }
    every = {"r": RANK, "lora_alpha": ALPHA}
    one = {f"base_model.model.{name}": factors[short] for short, name in names.items()}
    targets = {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    save_peft(folder / "one", one, **every, **targets, lora_bias=True, modules_to_save=["lm_head"])
    two = {f"base_model.model.{QUERY}.lora_{side}.weight": factors[f"r.{side}"] for side in "AB"}
    save_peft(folder / "two", two, **every, target_modules=["q_proj"], use_rslora=True)
    return factors


def exact_sums(base: dict[str, Tensor], of: dict[str, Tensor]) -> Sums:
    """W + Σ s·BA of every element, with s as float64 has it."""
    sums: Sums = {name: {at: Fraction(value) for at, value in elements(tensor)} for name, tensor in base.items()}
    plain, root = STRENGTHS[0] * (ALPHA / RANK), STRENGTHS[1] * (ALPHA / math.sqrt(RANK))
    rows = {name: tensor.double().tolist() for name, tensor in of.items()}
    columns = {name: tensor.double().T.tolist() for name, tensor in of.items() if tensor.dim() == 2}
    for row in range(WIDTH):
        sums[f"{QUERY}.bias"][row,] += Fraction(plain) * Fraction(rows["q.bias"][row])
        for column in range(WIDTH):
            sums[f"{QUERY}.weight"][row, column] += exact_products(rows["q.B"][row], columns["q.A"][column], plain)
            sums[f"{QUERY}.weight"][row, column] += exact_products(rows["r.B"][row], columns["r.A"][column], root)
        for token in range(VOCABULARY):  # its factors are the other way round
            sums[f"{EMBEDDING}.weight"][token, row] += exact_products(rows["e.B"][row], columns["e.A"][token], plain)
    for expert in range(EXPERTS):  # of A it has rows together, of B every so many columns; gate is the upper half
        down = of["x.A"][expert * RANK : (expert + 1) * RANK].double().T.tolist()
        up = of["x.B"][:, expert::EXPERTS].double().tolist()
        for half, part in enumerate(("gate", "up")):
            for row in range(MIDDLE):
                for column in range(WIDTH):
                    change = exact_products(up[half * MIDDLE + row], down[column], plain)
                    sums[EXPERT.format(expert, part)][row, column] += change
    sums["lm_head.weight"] = {at: Fraction(value) for at, value in elements(of["head"])}
    return sums


def elements(tensor: Tensor) -> list[tuple[tuple[int, ...], float]]:
    """The values of a tensor, each with its place."""
    return [(tuple(at), float(tensor[tuple(at)])) for at in torch.ones(tensor.shape).nonzero().tolist()]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_module_is_exact(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    base, factors = write_base(tmp_path / "base", dtype), write_adapters(tmp_path, stored)
    adapters = [tmp_path / "one", tmp_path / "two"]
    loratool.merge(tmp_path / "base", adapters, tmp_path / "out", weights=STRENGTHS, device="cpu")
    assert_rounded_once(load_file(tmp_path / "out" / "model.safetensors"), exact_sums(base, factors), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences_in_full_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a weight and of a bias, next to a product of factors, by a weight that is no power of two."""
    module = "diffusion_model.blocks.0.self_attn.q"
    base = {
        f"{module}.weight": made(WIDTH, WIDTH, seed=1, size=0.02).to(dtype),
        f"{module}.bias": made(WIDTH, seed=2, size=0.02).to(dtype),
        "diffusion_model.blocks.0.norm3.weight": made(WIDTH, seed=3).to(dtype),
    }
    save_file(base, tmp_path / "base.safetensors")
    changes = {
        f"{module}.lora_A.weight": made(RANK, WIDTH, seed=4),
        f"{module}.lora_B.weight": made(WIDTH, RANK, seed=5, size=0.01),
        f"{module}.diff_b": made(WIDTH, seed=6, size=0.01),
        "diffusion_model.blocks.0.norm3.diff": made(WIDTH, seed=7, size=0.01),
    }
    save_file(changes, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", out, weights=0.7, device="cpu")
    sums: Sums = {name: {at: Fraction(value) for at, value in elements(tensor)} for name, tensor in base.items()}
    for name, change in (("norm3.weight", "norm3.diff"), ("self_attn.q.bias", "self_attn.q.diff_b")):
        for at, value in elements(changes[f"diffusion_model.blocks.0.{change}"]):
            sums[f"diffusion_model.blocks.0.{name}"][at] += Fraction(0.7) * Fraction(value)
    up, down = changes[f"{module}.lora_B.weight"].tolist(), changes[f"{module}.lora_A.weight"].T.tolist()
    for row, column in sums[f"{module}.weight"]:
        sums[f"{module}.weight"][row, column] += exact_products(up[row], down[column], 0.7)
    assert_rounded_once(load_file(out), sums, dtype)


def assert_rounded_once(found: dict[str, Tensor], sums: Sums, dtype: torch.dtype) -> None:
    assert found.keys() == sums.keys()
    for name, exact in sums.items():
        assert found[name].dtype == dtype
        for at, value in elements(found[name]):
            assert value == nearest_value(exact[at], dtype), (name, at)
