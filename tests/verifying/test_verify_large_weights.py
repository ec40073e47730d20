"""Weights that are large enough for float32 are compared as float64 compares them, however much of them differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merged_models import CONFIG, Scene, rounded, write_adapter, write_model
from torch import Tensor

import loratool

NAME = "model.layers.0.self_attn.q_proj.weight"
# of more than 2^15 elements; those of one come in fours, and those of the other do not
SHAPES = [(256, 132), (401, 83)]
FLOAT32 = 5e-4  # of the elements are next to a tie, and may count as equal where float32 makes the same of them
MADE: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "rounded once": ("proven", lambda weight, change: rounded(weight.double() + change, weight.dtype)),
    "in float32": ("proven", lambda weight, change: (weight.float() + change.float()).to(weight.dtype)),
    "rounded twice": (
        "proven",
        lambda weight, change: (weight.float() + change.to(weight.dtype).float()).to(weight.dtype),
    ),
    "too strong": ("not-proven", lambda weight, change: rounded(weight.double() + 1.3 * change, weight.dtype)),
}


@pytest.fixture(
    scope="module", params=[(shape, dtype) for shape in SHAPES for dtype in (torch.float16, torch.bfloat16)]
)
def of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    (rows, columns), dtype = request.param
    home, generator = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(7)
    weights = {NAME: (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)}
    other = {"model.norm.weight": torch.ones(columns).to(dtype)}
    down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator) * 0.02
    config = {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_model(home / "base", {**weights, **other}, config)
    write_adapter(home / "adapter", {NAME: (down, up)}, r=4, lora_alpha=4.0, target_modules=["q_proj"])
    return Scene(home, {**weights, **other}, {NAME: (down.double(), up.double())})


@pytest.mark.parametrize("how", MADE)
def test_as_many_elements_are_equal_as_float64_finds(how: str, of: Scene, tmp_path: Path) -> None:
    verdict, make = MADE[how]
    made = of.merged(lambda name, weight: make(weight, of.change(name, 1.0)))
    found = loratool.verify(of.write(made, tmp_path / "merged"), of.base, of.adapter, device="cpu")
    assert found.tensors is not None
    proof = found.tensors[NAME]
    assert proof.equal is not None
    assert proof.ulp is not None
    wanted = rounded(of.weights[NAME].double() + of.change(NAME, 1.0), made[NAME].dtype)
    equal = float((made[NAME] == wanted).double().mean())
    assert equal - 1e-12 <= proof.equal <= equal + (0 if how == "rounded once" else FLOAT32)
    assert found.verdict == verdict
    assert (proof.ulp <= 1) == (verdict == "proven")
