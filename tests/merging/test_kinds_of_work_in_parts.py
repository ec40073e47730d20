"""Weights that are no plain sums, made in many small parts: the same bytes as those of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from merged_models import CONFIG, TARGETS, Scene, scene
from peft_files import named_by_peft, save_peft
from quantised_models import gptq

import loratool
from loratool.files import digests
from loratool.merging import dealing


@pytest.fixture(autouse=True)
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", 500)
    monkeypatch.setattr(dealing, "SMALLEST", 2000)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("plain"), size=0.5)


def dora(of: Scene, home: Path) -> tuple[Path, Path]:
    """Updates that need whole rows of the base, and a module that was saved whole."""
    modules = {name.removesuffix(".weight"): (up.float(), down.float()) for name, (down, up) in of.factors.items()}
    tensors = named_by_peft(modules)
    for name in of.factors:
        lengths = of.weights[name].float().norm(dim=1) * 1.1
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = lengths
    tensors["base_model.model.model.norm.weight"] = torch.ones_like(of.weights["model.norm.weight"])
    targets = [name.rpartition(".")[2] for name in TARGETS]
    settings = {"r": 5, "lora_alpha": 5, "use_dora": True, "target_modules": targets, "modules_to_save": ["norm"]}
    return of.base, save_peft(home / "dora", tensors, **settings)


def packed(of: Scene, home: Path) -> tuple[Path, Path]:
    """Weights of several tensors, which are packed as a whole."""
    made = gptq({name: weight.float() for name, weight in of.weights.items() if "_proj" in name}, bits=4, group=16)
    others = {name: weight for name, weight in of.weights.items() if name not in made.values}
    config = {**CONFIG, "quantization_config": made.config}
    return save_model(home / "packed", {**others, **made.tensors}, config), of.adapter


# The tensors of a packed weight are far apart in a file, in the order of their dtypes, and what lies between stays with them.
WORK = {"formula": (dora, {}, 10), "repack": (packed, {"requantize": True, "accept_loss": True}, 1)}


@pytest.mark.parametrize("kind", WORK)
def test_parts_make_the_bytes_of_one_process(kind: str, plain: Scene, tmp_path: Path) -> None:
    make, options, least = WORK[kind]
    keywords: dict[str, Any] = {"device": "cpu", **options}
    base, adapter = make(plain, tmp_path)
    merge = partial(loratool.merge_part, base, adapter, tmp_path / "out", **keywords)
    made = [len(merge(part=f"{number}/3").made) for number in (1, 2, 3)]
    assert sum(made) >= least
    loratool.finish_merge(base, adapter, tmp_path / "out", **keywords)
    loratool.merge(base, adapter, tmp_path / "alone", **keywords)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert loratool.verify(tmp_path / "out").passes
