"""Adapters that were trained on quantised weights and are merged into plain ones, and the other way round, are told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from packed_bnb import FourBit
from packed_models import save_packed
from peft_files import save_peft

import loratool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MODULE = "model.layers.0.self_attn.q_proj"
PACKED = FourBit((8, 32), "nf4", 64, 0)
REST: Mapping[str, NDArray[Any]] = {"model.norm.weight": np.ones(32, np.float32)}
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CARD = """# A model

## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: {}
- bnb_4bit_quant_type: nf4

### Framework versions
- PEFT 0.7.0
"""
CODES = {"trained-quantised", "trained-plain", "base-mismatch"}


def save_base(folder: Path, packed: bool, **config: Any) -> Path:
    weight = PACKED.tensors(f"{MODULE}.weight") if packed else {f"{MODULE}.weight": PACKED.values(f"{MODULE}.weight")}
    return save_packed(folder, {**weight, **REST}, CONFIG if packed else None, **config)


def save_adapter(folder: Path, base: str, card: str = "") -> Path:
    factors = {f"base_model.model.{MODULE}.lora_A.weight": torch.ones(1, 32)}
    factors[f"base_model.model.{MODULE}.lora_B.weight"] = torch.ones(8, 1)
    save_peft(folder, factors, r=1, lora_alpha=1, base_model_name_or_path=base)
    if card:
        (folder / "README.md").write_text(card)
    return folder


def told(base: Path, adapter: Path, out: Path) -> set[str]:
    """The codes of a plan, which are those of inspect."""
    plan = loratool.plan(base, [adapter], out)
    seen = loratool.inspect(adapter, base=str(base))
    assert seen.kind == "adapter"
    codes, others = ({note.code for note in notes} & CODES for notes in (plan.notes, seen.notes))
    assert codes == others
    return codes


@pytest.mark.parametrize(
    ("trained_on", "own_name", "packed", "wanted"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b", False, {"trained-quantised"}),
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b-bnb-4bit", True, set()),
        ("org/Qwen2.5-7B-Instruct-GPTQ-Int4", "org/Qwen2.5-7B-Instruct", False, {"trained-quantised"}),
        ("org/Qwen2.5-7B-Instruct-AWQ", "", False, {"trained-quantised"}),
        ("/models/phi-4-w4a16", "", False, {"trained-quantised"}),
        ("unsloth/llama-3-8b", "unsloth/llama-3-8b-bnb-4bit", True, {"trained-plain"}),
        ("org/llama-3-8b", "", True, {"trained-plain"}),
        ("org/base", "", True, set()),  # the folder has that name: its own copy, perhaps, and quantised from the start
        ("org/base", "", False, set()),
        ("", "", True, set()),
        ("org/base-fp8", "org/base-fp8", False, set()),
        ("org/other-4bit", "org/llama-3-8b", False, {"trained-quantised", "base-mismatch"}),
    ],
)
def test_names_tell_whether_a_model_is_quantised(
    tmp_path: Path, trained_on: str, own_name: str, packed: bool, wanted: set[str]
) -> None:
    base = save_base(tmp_path / "base", packed, **({"_name_or_path": own_name} if own_name else {}))
    assert told(base, save_adapter(tmp_path / "adapter", trained_on), tmp_path / "out") == wanted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trained_packed", [False, True])
def test_the_config_of_a_model_that_is_here_tells_more_than_its_name(
    tmp_path: Path, packed: bool, trained_packed: bool
) -> None:
    trained_on = save_base(tmp_path / "trained", trained_packed)
    adapter = save_adapter(tmp_path / "adapter", str(trained_on))
    wanted = set() if packed == trained_packed else {"trained-quantised" if trained_packed else "trained-plain"}
    assert told(save_base(tmp_path / "base", packed), adapter, tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("loaded", "packed", "wanted"),
    [("True", False, {"trained-quantised"}), ("False", False, set()), ("True", True, set())],
)
def test_the_card_that_peft_writes_tells_of_qlora(tmp_path: Path, loaded: str, packed: bool, wanted: set[str]) -> None:
    """Its config names the plain model, which was quantised when it was loaded."""
    adapter = save_adapter(tmp_path / "adapter", "org/llama", CARD.format(loaded))
    assert told(save_base(tmp_path / "base", packed), adapter, tmp_path / "out") == wanted
