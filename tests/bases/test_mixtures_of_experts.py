"""target_modules="all-linear" on mixtures of experts: routers and fused experts side by side, as PEFT adapts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from expert_routers import MODELS, build
from oracle import read_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from peft_zoo import shake

import loratool

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


class Trained:
    """A base, an all-linear adapter of it, and what PEFT merges."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.model = build(kind)
        self.model.save_pretrained(self.base)
        wrapped = get_peft_model(copy.deepcopy(self.model), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
        shake(wrapped, 3, 0.1)
        wrapped.save_pretrained(self.adapter)
        self.before = copy.deepcopy(self.model).state_dict()
        self.merged = wrapped.merge_and_unload()
        self.after = self.merged.state_dict()


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("mixture"), request.param)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= 2e-6, name


def test_routers_and_experts_are_merged_as_peft_merges_them(trained: Trained, tmp_path: Path) -> None:
    """Every tensor of the output, by its name on disk, is what transformers saves of PEFT's merged model."""
    loratool.merge(trained.base, [trained.adapter], tmp_path / "out")
    trained.merged.save_pretrained(tmp_path / "by_peft")
    assert_close(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "by_peft"))


REWORKED: dict[str, tuple[Callable[[Path, Path], object], float]] = {
    "rescale": (lambda source, out: loratool.rescale(source, out, scale=0.5), 0.5),
    "rescale, baked": (lambda source, out: loratool.rescale(source, out, scale=0.5, bake=True), 0.5),
    "combine": (lambda source, out: loratool.combine([source, source], out, weights=[1.0, 0.25]), 1.25),
    "resize": (lambda source, out: loratool.resize(source, out, rank=4), 1.0),
}


@pytest.mark.parametrize("name", REWORKED)
def test_peft_loads_what_is_made_of_such_an_adapter(trained: Trained, tmp_path: Path, name: str) -> None:
    """No key is missing and none unexpected, and PEFT's merge of the output is W + k · ΔW for the strength k."""
    rework, strength = REWORKED[name]
    rework(trained.adapter, tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(trained.model), tmp_path / "out")
    result = loaded.load_adapter(tmp_path / "out", "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and ".again" in key]
    found = loaded.merge_and_unload(adapter_names=["default"]).state_dict()
    wanted = {n: w + strength * (trained.after[n] - w) for n, w in trained.before.items()}
    assert_close(found, wanted)


def test_every_element_of_such_an_adapter_belongs_to_a_target(trained: Trained) -> None:
    """The parameters of the targets that `inspect` shows add up to the elements of the file's tensors."""
    report = loratool.inspect(trained.adapter)
    assert isinstance(report, loratool.AdapterFacts)
    elements = sum(tensor.numel() for tensor in read_tensors(trained.adapter).values())
    assert sum(target.parameters for target in report.targets) == elements
