"""What is made of adapters on a GPU is what is made of them on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from peft_files import save_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here, or LORATOOL_TEST_CUDA=1 is not set"
)

SHAPES = {f"model.layers.{n}.{m}": s for n in range(3) for m, s in (("q_proj", (96, 80)), ("up_proj", (200, 80)))}


def write(folder: Path, seed: int, rank: int, dtype: torch.dtype = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        spread = torch.arange(1, rank + 1).float().rsqrt()[:, None]
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = (a * spread).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (b * 0.1).to(dtype)
    return save_peft(folder, tensors, r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "up_proj"])


def deltas(folder: Path) -> dict[str, Tensor]:
    """By the formula in float64; α is the rank in what is made here."""
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {name: name.replace("lora_A", "lora_B") for name in tensors if "lora_A" in name}
    return {a: tensors[b].double() @ tensors[a].double() for a, b in pairs.items()}


def assert_alike(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for name, wanted in second.items():
        assert float((first[name] - wanted).norm() / wanted.norm()) <= tolerance, name


@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.8}, {"budget": 4000}], ids=str)
def test_resize(rule: dict[str, Any], tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", 1, 16)
    reports = {d: loratool.resize(adapter, tmp_path / d, device=d, **rule) for d in ("cpu", "cuda")}
    assert_alike(tmp_path / "cuda", tmp_path / "cpu")
    assert {t: m.rank for t, m in reports["cuda"].modules.items()} == {
        t: m.rank for t, m in reports["cpu"].modules.items()
    }
    assert reports["cuda"].totals.achieved == pytest.approx(reports["cpu"].totals.achieved, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "space"),
    [
        *((method, None) for method in ("linear", "slerp", "karcher", "tsv", "iso_c", "iso_cts", "linear-factors")),
        *((method, space) for method in ("ties", "dare_ties", "della", "sce") for space in ("dense", "core", "knots")),
    ],
)
def test_combine(method: str, space: str | None, tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(seed), seed, 8) for seed in (1, 2)]
    seed: dict[str, Any] = {"seed": 3} if method in ("dare_ties", "della") else {}
    for device in ("cpu", "cuda"):
        loratool.combine(adapters, tmp_path / device, method=method, space=space, device=device, **seed)
    # of entries that lie at a threshold or next to zero, rounding decides
    assert_alike(tmp_path / "cuda", tmp_path / "cpu", 1e-3 if space else 1e-6)


def test_compare(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(seed), seed, 8) for seed in (1, 2)]
    found = {d: loratool.compare(adapters, device=d).totals["1 × 2"] for d in ("cpu", "cuda")}
    assert found["cuda"].cosine == pytest.approx(found["cpu"].cosine, abs=1e-9)
    assert found["cuda"].overlap_out == pytest.approx(found["cpu"].overlap_out)
    assert found["cuda"].sign_conflict == pytest.approx(found["cpu"].sign_conflict, abs=1e-3)


def test_extract(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in SHAPES.items()}
    change = deltas(write(tmp_path / "adapter", 1, 8))
    tuned = {
        name: tensor + 0.1 * change[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"].float()
        for name, tensor in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_model(tmp_path / name, tensors, {})
    for device in ("cpu", "cuda"):
        loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / device, rank=8, device=device)
    assert_alike(tmp_path / "cuda", tmp_path / "cpu", 1e-5)
