"""How `combine` on whole weights differs from PEFT's `ties_svd` and its like: docs/algebra.md has the numbers, measured here.

PEFT's side is its own functions on its own ΔW, before it cuts to a rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PAGE = ROOT / "docs" / "algebra.md"
METHODS = ("ties", "ties, --sign frequency", "magnitude_prune", "dare_linear", "dare_ties")
WEIGHTS = ((1.0, 1.0), (2.0, 2.0), (0.7, 0.3), (1.0, -1.0))
DENSITY = {"dare_linear": 0.7, "dare_ties": 0.7}  # and 0.3 of the others


@dataclass(frozen=True)
class Two:
    """Two random adapters of rank 8 for a weight of 64 × 96."""

    folder: Path
    changes: list[Tensor]  # ΔW of each, by PEFT

    def combined(self, out: Path, method: str, weights: tuple[float, ...]) -> Tensor:
        """ΔW of what `combine` makes of them at full rank, by PEFT."""
        name, _, sign = method.partition(", --sign ")
        loratool.combine(
            [self.folder / "one", self.folder / "two"], out, method=name, weights=list(weights), rank=64,
            density=DENSITY.get(name, 0.3), sign=sign or "total",
        )  # fmt: skip
        return change_of(PeftModel.from_pretrained(weight(), out), "default")

    def by_peft(self, method: str, weights: tuple[float, ...], seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        name, _, sign = method.partition(", --sign ")
        merge: Callable[..., Tensor] = getattr(merge_utils, name)
        return merge(self.changes, torch.tensor(weights), DENSITY.get(name, 0.3), *([sign] if sign else []))


def weight() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64, bias=False))


def change_of(wrapped: nn.Module, name: str) -> Tensor:
    layers: list[Any] = [module for module in wrapped.modules() if hasattr(module, "get_delta_weight")]
    result: Tensor = layers[0].get_delta_weight(name).detach()
    return result


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"])
    wrapped = get_peft_model(weight(), config, adapter_name="one")
    wrapped.add_adapter("two", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return Two(folder, [change_of(wrapped, name) for name in ("one", "two")])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def told(page: str) -> dict[tuple[float, ...], list[float]]:
    """The rows of the page's table of differences: weights → numbers by method."""
    rows = re.findall(r"^\| (-?[\d.]+), (-?[\d.]+) \| (.*) \|$", page, re.MULTILINE)
    return {(float(a), float(b)): [float(cell) for cell in cells.split(" | ")] for a, b, cells in rows}


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_page_has_the_measured_differences_from_peft(two: Two, weights: tuple[float, ...], tmp_path: Path) -> None:
    """Every number of the table is what the two make of the same adapters, to the digits that it has."""
    row = told(PAGE.read_text())[weights]
    assert len(row) == len(METHODS)
    for method, number in zip(METHODS, row, strict=True):
        measured = apart(two.combined(tmp_path / method, method, weights), two.by_peft(method, weights))
        within = 0.03 if method in DENSITY else 0.006 if number else 1e-5  # DARE draws from torch's own generator
        assert measured == pytest.approx(number, abs=within), method


@pytest.mark.parametrize("method", METHODS[:2])
def test_equal_weights_are_pefts_with_lambda(two: Two, method: str, tmp_path: Path) -> None:
    """With all weights w, TIES is PEFT's when w is given as λ: the page says so."""
    loratool.combine(
        [two.folder / "one", two.folder / "two"], tmp_path / "out", method="ties", density=0.3, rank=64, factor=2.0,
        sign=method.partition(", --sign ")[2] or "total",
    )  # fmt: skip
    found = change_of(PeftModel.from_pretrained(weight(), tmp_path / "out"), "default")
    assert apart(found, two.by_peft(method, (2.0, 2.0))) < 1e-5


def test_dare_differs_from_pefts_as_pefts_from_itself(two: Two) -> None:
    """The numbers of DARE are those of two seeds: PEFT, run twice, is as far from itself."""
    row = told(PAGE.read_text())[1.0, 1.0]
    between = apart(two.by_peft("dare_linear", (1.0, 1.0), 1), two.by_peft("dare_linear", (1.0, 1.0), 2))
    assert between == pytest.approx(row[METHODS.index("dare_linear")], abs=0.03)
