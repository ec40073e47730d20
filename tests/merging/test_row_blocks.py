"""Row blocks: whatever the blocks, the workers and the limits, a weight is W + Σ strength · ΔW, rounded once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_files import save_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.replacing import Replace
from loratool.bases.edits import Edit
from loratool.merging import resources
from loratool.merging.loaded_edits import LoadedEdit

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here, or LORATOOL_TEST_CUDA=1 is not set"
)


def make_pair(
    folder: Path, rows: int = 96, columns: int = 80, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """A base with one weight and an adapter for it."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    save_file({"q.weight": weight.to(dtype), "norm.weight": torch.ones(columns).to(dtype)}, base / "model.safetensors")
    factors = {
        "base_model.model.q.lora_A.weight": torch.randn(4, columns, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(rows, 4, generator=generator),
    }
    save_peft(adapter, factors, r=4, lora_alpha=6)
    return base, adapter


def formula(base: Path, adapter: Path) -> torch.Tensor:
    weight = load_file(base / "model.safetensors")["q.weight"]
    factors = load_file(adapter / "adapter_model.safetensors")
    up, down = (factors[f"base_model.model.q.lora_{x}.weight"].double() for x in "BA")
    return (weight.double() + 6 / 4 * (up @ down)).to(weight.dtype)


@pytest.mark.parametrize("block", [1, 160, 1000, 1 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_block_size_and_workers_do_not_show_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, workers: int
) -> None:
    base, adapter = make_pair(tmp_path, dtype=torch.float32)
    monkeypatch.setattr(resources, "CPU_BLOCK", block)
    loratool.merge(base, [adapter], tmp_path / "out", workers=workers)
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert torch.equal(merged, formula(base, adapter))


def test_lora_and_dora_of_one_weight_are_merged_one_after_the_other(tmp_path: Path) -> None:
    base, lora = make_pair(tmp_path, dtype=torch.float32)
    dora = tmp_path / "dora"
    shutil.copytree(lora, dora)
    factors = load_file(lora / "adapter_model.safetensors")
    magnitude = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 1
    save_peft(
        dora, {**factors, "base_model.model.q.lora_magnitude_vector": magnitude}, r=4, lora_alpha=6, use_dora=True
    )
    loratool.merge(base, [lora, dora], tmp_path / "out", weights=[1.0, 0.5])
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    weight = load_file(base / "model.safetensors")["q.weight"].double()
    up, down = (factors[f"base_model.model.q.lora_{x}.weight"].double() for x in "BA")
    first = weight + 6 / 4 * up @ down
    norms = torch.linalg.vector_norm(weight + 6 / 4 * up @ down, dim=1)  # with the unmerged weight
    wanted = first.lerp((first + 6 / 4 * up @ down) * (magnitude.double() / norms)[:, None], 0.5)
    torch.testing.assert_close(merged, wanted.float(), rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("kind", ["low rank", "replacement"])
def test_an_edit_of_some_rows_leaves_the_others_alone(first: int, count: int, kind: str) -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    up, down = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    update = LowRank(up, down, 0.5) if kind == "low rank" else Replace(up @ down)
    wanted = weight.clone()
    wanted[2:5] = weight[2:5] + 0.5 * up @ down if kind == "low rank" else up @ down
    block = weight[first : first + count].clone()
    LoadedEdit(Edit("w", 2, 3, update, 1.0, 0, "w", "exact"), update, 1.0).apply(block, first, block)
    torch.testing.assert_close(block, wanted[first : first + count])


@pytest.mark.parametrize("still", [slice(48, None), slice(None, 48)], ids=["last", "first"])
def test_one_changed_block_is_a_change_whichever_of_two_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still: slice
) -> None:
    base, adapter = make_pair(tmp_path)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.q.lora_B.weight"][still] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    monkeypatch.setattr(resources, "CPU_BLOCK", 48 * 80 * 2)
    loratool.merge(base, [adapter], tmp_path / "out", device="cpu", workers=2)  # which is refused if nothing changed
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert float((merged != formula(base, adapter)).double().mean()) < 1e-3
    before = load_file(base / "model.safetensors")["q.weight"]
    assert torch.equal(merged[still], before[still])


def test_float32_products_ignore_a_setting_that_would_round_them(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path)
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        loratool.merge(base, [adapter], tmp_path / "out")
        assert torch.get_float32_matmul_precision() == "medium"  # and it is given back
        assert torch.get_num_threads() == before[1]
    finally:
        torch.set_float32_matmul_precision(before[0])
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert float((merged != formula(base, adapter)).double().mean()) < 1e-3


def test_a_memory_limit_that_cannot_be_kept_names_one_that_can(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path)
    with pytest.raises(
        loratool.UsageError, match=r"max-memory: 0.001 MB is too little; this merge needs at least (\d+) MB"
    ):
        loratool.merge(base, [adapter], tmp_path / "out", max_memory=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_process_stays_within_its_memory_limit(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, rows=4096, columns=2048)
    words = [str(base), str(adapter), "-o", str(tmp_path / "out"), "--device", "cpu"]
    command = [sys.executable, "-m", "loratool", "merge", *words]
    refused = subprocess.run([*command, "--max-memory", "1kB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    least = re.search(r"at least (\d+) MB", refused.stderr)
    assert least, refused.stderr
    limit = int(least[1]) + 5  # what torch itself takes varies a little from run to run
    answer = subprocess.run(
        [*command, "--max-memory", f"{limit}MB", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["cost"]["peak_memory"] <= limit * 10**6


def test_an_absent_cuda_device_is_told(tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(loratool.UsageError, match=missing):
        loratool.merge(base, [adapter], tmp_path / "out", device=missing)
    assert not (tmp_path / "out").exists()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cuda_gives_the_formula_too(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = make_pair(tmp_path, rows=3000, columns=700, dtype=dtype)
    report = loratool.merge(base, [adapter], tmp_path / "out", device="cuda")
    merged = load_file(tmp_path / "out" / "model.safetensors")["q.weight"]
    assert report.cost.device.startswith("cuda:0")
    if dtype in (torch.bfloat16, torch.float16):
        assert float((merged != formula(base, adapter)).double().mean()) < 1e-4
    torch.testing.assert_close(merged, formula(base, adapter))
