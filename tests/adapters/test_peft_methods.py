"""Every type of adapter that is merged at all is merged as PEFT itself merges it, from files alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
from peft_methods import CASES, LINEAR
from peft_zoo import assert_merged_alike, make_zoo, save_base, shake, train
from safetensors.torch import load_file, save_file

import loratool
from loratool.merging import resources


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_merged_as_peft_merges_it(tmp_path: Path, name: str) -> None:
    zoo = make_zoo()
    pair = train(tmp_path, zoo, CASES[name].config())
    assert_merged_alike(pair.merge(tmp_path / "out"), pair, *CASES[name].edited)


def test_a_pruned_adalora_keeps_the_rank_that_it_began_with_below_its_alpha(tmp_path: Path) -> None:
    """Pruning drops rows of the factors when the adapter is saved; PEFT reads it back with the first rank."""
    zoo, adapter = make_zoo(), tmp_path / "adapter"
    config = peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, target_r=2, lora_alpha=7, total_step=10)
    base = save_base(tmp_path / "base", zoo)
    wrapped = peft.get_peft_model(copy.deepcopy(zoo), config)
    shake(wrapped, 3, 0.3)
    kept = {"linear": [True, False, True, True], "square": [False, False, True, False]}
    start = "base_model.model"
    wrapped.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": rows for name, rows in kept.items()}
    wrapped.save_pretrained(adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored[f"{start}.square.lora_A"].shape == (1, 24)
    loratool.merge(base, [adapter], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in kept:
        a, b, e = (stored[f"{start}.{name}.lora_{side}"].double() for side in "ABE")
        wanted = zoo.state_dict()[f"{name}.weight"] + 7 / (4 + 1e-5) * b @ (a * e)
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(zoo), adapter).merge_and_unload().state_dict()
    for name in kept:
        torch.testing.assert_close(found[f"{name}.weight"], reloaded[f"{name}.weight"], rtol=1e-5, atol=1e-5)


FIRST = {name.partition(",")[0].partition(" ")[0]: name for name in reversed(CASES)}  # one case of each type


@pytest.mark.parametrize("kind", FIRST)
def test_blocks_and_workers_do_not_show_in_the_bytes_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """All rows at once, or row by row on five threads: the last bits of float64 do not reach those of the output."""
    pair = train(tmp_path, make_zoo(), CASES[FIRST[kind]].config())
    loratool.merge(pair.base, [pair.adapter], tmp_path / "one", workers=1, device="cpu")
    for size in ("CPU_BLOCK", "FORMULA_BLOCK"):
        monkeypatch.setattr(resources, size, 1)  # a row
    loratool.merge(pair.base, [pair.adapter], tmp_path / "many", workers=5, device="cpu")
    one, many = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many


@pytest.mark.parametrize("kind", FIRST)
def test_parameters_are_counted_as_peft_counts_them(tmp_path: Path, kind: str) -> None:
    """What is saved besides, such as bases, places and projections, is not trained; what layers share is counted once."""
    zoo = make_zoo()
    base = save_base(tmp_path / "base", zoo)
    wrapped = peft.get_peft_model(zoo, CASES[FIRST[kind]].config())
    wrapped.save_pretrained(tmp_path / "adapter")
    facts = loratool.inspect(tmp_path / "adapter", base=base)
    assert isinstance(facts, loratool.AdapterFacts)
    assert facts.against is not None
    assert (facts.against.trainable, facts.against.all_parameters) == wrapped.get_nb_trainable_parameters()


# Types whose tensors have names of several parts, as the module that holds them registers them.
NESTED = ["GLORA", "PEANUT with three layers", "OSF", "TINYLORA", "FROD"]


@pytest.mark.parametrize("name", NESTED)
def test_the_name_of_the_adapter_in_a_raw_state_dict_is_no_part_of_a_tensor(tmp_path: Path, name: str) -> None:
    """`glora_A.default.Xd` is `glora_A.Xd`. FRoD's shared tensors have the name at the end, and are saved without."""
    pair = train(tmp_path, make_zoo(), CASES[name].config())
    path = pair.adapter / "adapter_model.safetensors"
    slot = re.compile(r"\.((?:glora|peanut|osf|tinylora|frod_lambda)_\w+)(?=\.|$)")
    save_file({slot.sub(r".\1.default", key): tensor for key, tensor in load_file(path).items()}, path)
    assert_merged_alike(pair.merge(tmp_path / "out"), pair, *CASES[name].edited)
