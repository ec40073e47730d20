"""What inspect counts is what is in the file: every tensor once, in a module or among the rest with its reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_variants import VARIANTS
from peft import get_peft_model
from peft_files import save_peft
from peft_methods import CASES
from peft_zoo import make_zoo, shake
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli import run

ZOO = make_zoo()
CONFIGS: dict[str, Any] = {**CASES, **VARIANTS}


def check_totals(adapter: Path) -> Any:
    """Hold what inspect tells to the file, as the safetensors package reads it."""
    facts: Any = loratool.inspect(adapter)
    stored = {name: tensor.numel() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    of_modules = {name for module in facts.modules for name in module.tensors}
    assert of_modules | facts.rest.keys() == stored.keys()
    assert not of_modules & facts.rest.keys()
    assert sum(module.parameters for module in facts.modules) == sum(stored[name] for name in of_modules)
    assert facts.parameters == sum(stored.values())
    return facts


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_of_all_modules_and_of_the_rest_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    """Every type and every variant: no tensor is missing, none is counted twice, and the sums are exact."""
    wrapped = get_peft_model(copy.deepcopy(ZOO), CONFIGS[name].config())
    shake(wrapped, 1, 0.1)
    wrapped.save_pretrained(tmp_path)
    check_totals(tmp_path)


HEAD = "base_model.model.classifier"


def write_head(folder: Path, spell: str = "") -> Path:
    """LoRA on a head that is saved whole too, as PEFT saves it: factors plain, and under both of its copies."""
    generator = torch.Generator().manual_seed(6)
    shapes = {"base_layer.weight": (3, 8), "base_layer.bias": (3,)}
    for copied in ("", "modules_to_save.", "original_module."):
        shapes |= {f"{copied}lora_A{spell}.weight": (2, 8), f"{copied}lora_B{spell}.weight": (3, 2)}
    tensors = {f"{HEAD}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {
        f"base_model.model.query.lora_{side}{spell}.weight": torch.randn(2, 2, generator=generator) for side in "AB"
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["classifier", "query"]}
    return save_peft(folder, tensors, **{**config, "task_type": "SEQ_CLS"})


@pytest.mark.parametrize("spell", ["", ".default"], ids=["as saved", "raw state dict"])
def test_a_head_with_lora_that_is_saved_whole_is_one_target_with_its_copies(tmp_path: Path, spell: str) -> None:
    """inspect shows classifier once, with all six factors; no target bears a name that PEFT made up."""
    facts = check_totals(write_head(tmp_path / "adapter", spell))
    (head,) = (module for module in facts.modules if module.target == "classifier.weight")
    assert len(head.tensors) == 6
    assert head.rank == 2
    assert not any("modules_to_save" in m.target or "original_module" in m.target for m in facts.modules)


@pytest.mark.parametrize(
    "words",
    [["merge", "BASE", "ADAPTER"], ["combine", "ADAPTER"], ["resize", "ADAPTER", "--rank", "1"]],
    ids=lambda words: words[0],
)
def test_such_a_head_is_refused_with_the_reason_and_without_a_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The copies are named, PEFT's own failure is told, and no --map is proposed that would fold the copies in."""
    write_head(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    base = {"classifier.weight": torch.ones(3, 8), "classifier.bias": torch.ones(3), "query.weight": torch.ones(2, 2)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    places = {"BASE": str(tmp_path / "base"), "ADAPTER": str(tmp_path / "adapter")}
    assert run([*(places.get(word, word) for word in words), "-o", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert f"{HEAD}.modules_to_save.lora_A.weight" in told
    assert "PEFT" in told
    assert "--map" not in told
    assert not (tmp_path / "out").exists()
