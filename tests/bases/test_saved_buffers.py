"""Buffers of modules that are saved whole: running statistics, counts of batches, tables of whole numbers and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import randomise
from torch import Tensor, nn

import loratool
from loratool.cli import run


class Table(nn.Module):
    """A module of buffers alone, in dtypes that nothing is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("order", torch.arange(6, dtype=torch.int32))
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))
        self.register_buffer("small", torch.zeros(6, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        order, mask, small = (self.get_buffer(name) for name in ("order", "mask", "small"))
        return x[:, order.long()] * mask * self.scale + small


class Net(nn.Module):
    """A layer for LoRA, and modules with buffers to save whole."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.table = Table()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.table(self.norm(self.q(x)))
        return result


def build() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def train(folder: Path, seed: int = 2) -> Path:
    """An adapter as PEFT saves it, with every buffer another than the base's."""
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm", "table"]))
    randomise(wrapped, seed)
    wrapped.train()
    for _ in range(3):
        wrapped(torch.randn(8, 6))
    own: Any = wrapped.base_model.model.table.modules_to_save["default"]
    own.order.copy_(torch.tensor([5, 3, 1, 0, 2, 4]))
    own.mask[2] = False
    own.small[4] = 7
    wrapped.eval().save_pretrained(folder)
    return folder


def by_peft(adapter: Path) -> dict[str, Tensor]:
    merged: Any = PeftModel.from_pretrained(build(), adapter).merge_and_unload()
    found: dict[str, Tensor] = merged.state_dict()
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(build().state_dict(), tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return train(tmp_path / "adapter")


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"shard_size": 100}], ids=["plain", "bf16", "sharded"])
def test_buffers_are_merged_as_peft_merges_them(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every tensor is what PEFT's merge makes of it: whole numbers and flags exactly, whatever the dtype of floats."""
    loratool.merge(base, [adapter], tmp_path / "out", **options)
    found = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    wanted = by_peft(adapter)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            wide = options.get("dtype") is None
            assert found[name].dtype == (torch.float32 if wide else torch.bfloat16)
            off = 1e-5 if wide else 1e-2
            torch.testing.assert_close(found[name].float(), value, atol=off, rtol=off)
        else:
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "words",
    [
        ["rescale", "ADAPTER", "--scale", "1"],
        ["rescale", "ADAPTER", "--bake"],
        ["resize", "ADAPTER", "--rank", "2"],
        ["combine", "ADAPTER", "--rank", "2"],
        ["combine", "ADAPTER", "OTHER", "-w", "1", "-w", "0", "--saved", "first"],
        ["combine", "ADAPTER", "OTHER", "-w", "1", "-w", "0", "--saved", "mean"],
    ],
    ids=" ".join,
)
def test_buffers_come_along_through_the_algebra(adapter: Path, tmp_path: Path, words: list[str]) -> None:
    """PEFT loads what comes out, and whole numbers and flags are those of the first adapter; floats of a mean differ."""
    other = train(tmp_path / "other", 9)
    places = {"ADAPTER": str(adapter), "OTHER": str(other)}
    assert run([*(places.get(word, word) for word in words), "-o", str(tmp_path / "out")]) == 0
    found, wanted = by_peft(tmp_path / "out"), by_peft(adapter)
    for name, value in wanted.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
        elif "mean" not in words:
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_inspect_and_push_count_buffers_as_they_are(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect lists buffers with what is saved whole, finds nothing wrong, and push would send them."""
    assert run(["inspect", str(adapter), "--check", "--values", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["results"]
    stored = load_file(adapter / "adapter_model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert {"norm.num_batches_tracked", "table.mask", "table.order"} <= set(facts["saved"])
    assert run(["push", str(adapter), "me/adapter", "--dry-run"]) == 0


@pytest.mark.parametrize("change", [{"dtype": torch.int32}, {"shape": (1,)}], ids=["dtype", "shape"])
def test_a_buffer_of_another_kind_than_the_bases_is_refused(
    base: Path, adapter: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Nothing converts a count or a flag: both sides are named, and nothing is written."""
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    name = "base_model.model.norm.num_batches_tracked"
    stored[name] = stored[name].to(change.get("dtype", torch.int64)).reshape(change.get("shape", ()))
    save_file(stored, path)
    with pytest.raises(loratool.FitError, match="num_batches_tracked"):
        loratool.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_adapters_with_the_same_buffers_agree_and_with_others_do_not(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Equal counts may come from both; where they differ, both adapters are named."""
    other = train(tmp_path / "other", 2)
    path = other / "adapter_model.safetensors"
    stored, mine = load_file(path), load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in stored.items() if "lora" in k}, path)
    loratool.merge(base, [adapter, other], tmp_path / "out")
    changed = {**mine, "base_model.model.norm.num_batches_tracked": torch.tensor(99)}
    save_file(changed, path)
    with pytest.raises(loratool.FitError, match="several adapters"):
        loratool.merge(base, [adapter, other], tmp_path / "second")
