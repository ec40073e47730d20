"""Which way round a matrix is stored: who is believed, and what is refused because it contradicts.

The oracles are the formula W + (α/r)·BA, or its transpose, in numpy; transformers' own source for which classes have
Conv1D; and PEFT on models with Conv1D of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from malformed import Stored, f32, random, write_adapter, write_base, write_json
from oracle import read_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from workbench import Workbench, tensors_of

import loratool
from loratool import extract
from loratool.layouts.architectures import CONV1D_TYPES
from loratool.layouts.native import NATIVE_TYPES

PREFIX = "base_model.model."
SIZE = 8
SQUARE, WIDE = "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_attn"
YES, NO = "--fan-in-fan-out", "--no-fan-in-fan-out"
SCALE = 2.0  # α / r


def make(
    bench: Workbench,
    shapes: Mapping[str, tuple[int, int]],
    layers: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    flag: bool | None,
    **settings: Any,
) -> None:
    """A base of matrices as they are stored, and an adapter of layers (out, in)."""
    write_base(bench.base, {f"{name}.weight": f32(random(*shape)) for name, shape in shapes.items()})
    write_json(bench.base / "config.json", config)
    tensors: dict[str, Stored] = {}
    for name, (out, into) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = f32(random(2, into, seed=1))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = f32(random(out, 2, seed=2))
    said = {} if flag is None else {"fan_in_fan_out": flag}
    write_adapter(bench.adapter, tensors, r=2, lora_alpha=4, target_modules=None, **said, **settings)


def is_turned(bench: Workbench, module: str, after: Mapping[str, Any]) -> bool:
    """Whether W' is W + (s·BA)ᵀ; it must be that or W + s·BA."""
    saved = tensors_of(bench.adapter)
    a, b = (saved[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    change = after[f"{module}.weight"] - tensors_of(bench.base)[f"{module}.weight"]
    straight, turned = (
        change.shape == wanted.shape and np.allclose(change, wanted, rtol=0, atol=1e-6)
        for wanted in (SCALE * b @ a, (SCALE * b @ a).T)
    )
    assert straight != turned
    return turned


GPT2_DECODER = {
    "model_type": "vision-encoder-decoder",
    "decoder": {"model_type": "gpt2"},
    "encoder": {"model_type": "vit"},
}
# (config of the base, fan_in_fan_out of the adapter, option) → how the square c_proj is stored; None: nobody says
WITNESSES: dict[str, tuple[dict[str, Any], bool | None, str, bool | None]] = {
    "class": ({"model_type": "gpt2"}, None, "", True),
    "class and config": ({"model_type": "gpt2"}, True, "", True),
    "class over config": ({"model_type": "gpt2"}, False, "", True),
    "class of nn.Linear over config": ({"model_type": "gpt_bigcode"}, True, "", False),
    "class of custom code": ({"model_type": "qwen"}, True, "", False),
    "class by its name": ({"architectures": ["GPT2LMHeadModel"]}, False, "", True),
    "class of a part": (GPT2_DECODER, False, "", True),
    "option over class": ({"model_type": "gpt2"}, True, NO, False),
    "option over class of nn.Linear": ({"model_type": "starcoder2"}, False, YES, True),
    "option over config": ({"model_type": "mystery"}, False, YES, True),
    "other option over config": ({"model_type": "mystery"}, True, NO, False),
    "config of an unknown class": ({"model_type": "mystery"}, True, "", True),
    "config against, of an unknown class": ({"model_type": "mystery"}, False, "", False),
    "config without a class": ({}, True, "", True),
    "nobody": ({"model_type": "mystery"}, None, "", None),
    "nobody at all": ({}, None, "", None),
}


@pytest.mark.parametrize("name", WITNESSES)
def test_a_square_weight_is_stored_as_the_first_says_who_knows(bench: Workbench, name: str) -> None:
    """The option comes first, then the model's class, then the adapter's config; where none of them says, it asks."""
    config, flag, option, wanted = WITNESSES[name]
    make(bench, {SQUARE: (SIZE, SIZE)}, {SQUARE: (SIZE, SIZE)}, config, flag)
    if wanted is None:
        bench.refuses_to_merge(SQUARE, f"{YES} or {NO}", code=4)
        for way_out, turned in ((YES, True), (NO, False)):
            after, _ = bench.merges(way_out, "--overwrite")
            assert is_turned(bench, SQUARE, after) == turned
        return
    after, _ = bench.merges(*([option] if option else []))
    assert is_turned(bench, SQUARE, after) == wanted


def test_the_class_that_was_trained_counts_where_the_base_names_none(bench: Workbench) -> None:
    """`auto_mapping` of an adapter names the class of the model, which is believed before `fan_in_fan_out`."""
    mapping = {"base_model_class": "GPT2Model", "parent_library": "transformers.models.gpt2.modeling_gpt2"}
    make(bench, {SQUARE: (SIZE, SIZE)}, {SQUARE: (SIZE, SIZE)}, {}, False, auto_mapping=mapping)
    assert is_turned(bench, SQUARE, bench.merges()[0])


# (config of the base, fan_in_fan_out of the adapter, option, c_attn stored (in, out)) → what the refusal proposes
CONTRADICTIONS: dict[str, tuple[dict[str, Any], bool | None, str, bool, str]] = {
    "option against shapes": ({}, None, YES, False, "drop the option"),
    "other option against shapes": ({}, None, NO, True, "drop the option"),
    "class against shapes": ({"model_type": "gpt2"}, None, "", False, NO),
    "config against shapes": ({"model_type": "mystery"}, False, "", True, YES),
    "other config against shapes": ({"model_type": "mystery"}, True, "", False, NO),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_the_shapes_is_refused_with_a_way_out_that_works(bench: Workbench, name: str) -> None:
    """A square c_proj beside a c_attn whose shape shows another way round than the option, class or config says."""
    config, flag, option, in_out, way_out = CONTRADICTIONS[name]
    wide = (SIZE, 3 * SIZE) if in_out else (3 * SIZE, SIZE)
    layers = {WIDE: (3 * SIZE, SIZE), SQUARE: (SIZE, SIZE)}
    make(bench, {WIDE: wide, SQUARE: (SIZE, SIZE)}, layers, config, flag)
    bench.refuses_to_merge(way_out, code=4, options=[option] if option else [])
    after, _ = bench.merges(*([] if option else [way_out]))
    assert is_turned(bench, WIDE, after) == is_turned(bench, SQUARE, after) == in_out


@pytest.mark.parametrize("in_out", [False, True])
def test_biases_of_the_base_show_how_its_matrices_are_stored(bench: Workbench, in_out: bool) -> None:
    """A bias is as long as the output is wide: with no class and no flag it decides, and a note says so."""
    make(bench, {SQUARE: (SIZE, SIZE)}, {SQUARE: (SIZE, SIZE)}, {"model_type": "mystery"}, None)
    wide = random(SIZE, 3 * SIZE) if in_out else random(3 * SIZE, SIZE)
    tensors = {f"{SQUARE}.weight": f32(random(SIZE, SIZE)), f"{WIDE}.weight": f32(wide)}
    config = json.loads((bench.base / "config.json").read_text())
    write_base(bench.base, {**tensors, f"{WIDE}.bias": f32(random(3 * SIZE))})
    write_json(bench.base / "config.json", config)
    after, report = bench.merges()
    assert is_turned(bench, SQUARE, after) == in_out
    assert any("like the non-square ones" in str(note) for note in report["notes"])


LINEAR = {f"model.layers.{n}.mlp.up_proj": (3 * SIZE, SIZE) for n in range(3)}


@pytest.mark.parametrize("flag", [None, False])
@pytest.mark.parametrize(
    "config", [{"model_type": "llama"}, {"model_type": "mystery"}, {}], ids=["class", "own", "none"]
)
@pytest.mark.parametrize("side", ["base", "adapter"])
def test_one_transposed_weight_among_straight_ones_is_refused(
    bench: Workbench, side: str, config: dict[str, Any], flag: bool | None
) -> None:
    """Its update fits only transposed, whether the base or the adapter has it the other way round than its kin."""
    odd = "model.layers.1.mlp.up_proj"
    shapes, layers = ({**LINEAR, odd: LINEAR[odd][::-1]} if side == which else LINEAR for which in ("base", "adapter"))
    make(bench, shapes, layers, config, flag)
    bench.refuses_to_merge(odd, "transposed" if config.get("model_type") != "llama" else "(in, out)", code=4)
    bench.refuses("inspect", bench.adapter, "--base", bench.base, told=[odd], code=4)


def test_all_weights_transposed_are_refused_unless_that_is_said(bench: Workbench) -> None:
    """Where the adapter's config says (out, in), layers that fit only (in, out) are merged by the option alone."""
    make(bench, {n: s[::-1] for n, s in LINEAR.items()}, LINEAR, {"model_type": "mystery"}, False)
    bench.refuses_to_merge("up_proj", YES, code=4)
    after, _ = bench.merges(YES)
    assert all(is_turned(bench, name, after) for name in LINEAR)


def test_inspect_takes_the_words_of_a_merge(bench: Workbench) -> None:
    """`inspect --base` asks as `merge` does, and the answers that it proposes work."""
    make(bench, {SQUARE: (SIZE, SIZE)}, {SQUARE: (SIZE, SIZE)}, {}, None)
    bench.refuses("inspect", bench.adapter, "--base", bench.base, told=[f"{YES} or {NO}"], code=4)
    assert bench.run("inspect", bench.adapter, "--base", bench.base, YES).code == 0
    write_base(bench.base, {"other.c_proj.weight": f32(random(SIZE, SIZE))})
    mapped = rf"^{re.escape(SQUARE)}\b=other.c_proj"
    assert bench.run("inspect", bench.adapter, "--base", bench.base).code == 4
    assert bench.run("inspect", bench.adapter, "--base", bench.base, "--map", mapped, NO).code == 0


# -- the table against transformers ------------------------------------------------------------------

MODELS = Path(transformers.__file__).parent / "models"


def assigned(kind: str) -> dict[str, set[str]]:
    """Folder of a family → the names that its code gives to layers of a kind."""
    found: dict[str, set[str]] = {}
    for path in MODELS.glob("*/modeling_*.py"):
        for name in re.findall(rf"self\.(\w+) = {kind}\(", path.read_text(encoding="utf-8")):
            found.setdefault(path.parent.name, set()).add(name)
    return found


def test_every_class_of_transformers_with_conv1d_is_in_the_table() -> None:
    """The names that its code gives to Conv1D are the table's, and no other family has any."""
    table = {kind.replace("-", "_"): set(names) for kind, names in CONV1D_TYPES.items()}
    table = {folder: table["openai_gpt" if folder == "openai" else folder] for folder in assigned("Conv1D")}
    assert assigned("Conv1D").keys() >= {"gpt2", "openai", "imagegpt", "decision_transformer", "clvp"}
    for folder, names in assigned("Conv1D").items():
        assert names <= table[folder], folder
    assert not {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"} & NATIVE_TYPES
    assert {"gpt_bigcode", "starcoder2", "gpt_neo", "llama"} <= NATIVE_TYPES


# -- models with code of their own, under PEFT --------------------------------------------------------


class Block(nn.Module):
    """Square Conv1D layers with names that the table does not have, and with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.c_proj, self.mix, self.plain = Conv1D(SIZE, SIZE), Conv1D(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.plain(self.mix(torch.tanh(self.c_proj(x))))
        return found


def own_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(Block(), Block())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("targets", [["c_proj"], ["mix"], ["plain"]])
def test_what_peft_saved_of_a_class_that_nobody_knows_is_merged_as_peft_merges_it(
    targets: list[str], tmp_path: Path
) -> None:
    """PEFT writes `fan_in_fan_out` by the layers it finds, so that it is the truth about layers of one kind."""
    model = own_model()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "config.json", {"model_type": "mystery"})
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = wrapped.merge_and_unload().state_dict()
    found = read_tensors(tmp_path / "out")
    assert found.keys() == merged.keys()
    assert all(torch.allclose(found[name], merged[name], atol=1e-6) for name in merged)


@pytest.mark.parametrize("option", [None, True])
def test_extract_asks_how_conv1d_of_an_unknown_class_is_stored(option: bool | None, tmp_path: Path) -> None:
    """Nothing but the option tells, square weights having no bias that shows it; PEFT then loads what is written."""
    for folder, model in (("base", own_model()), ("tuned", own_model())):
        tensors = model.state_dict()
        if folder == "tuned":
            for name in tensors:
                if name.endswith("c_proj.weight"):
                    torch.manual_seed(len(name))
                    tensors[name] = tensors[name] + torch.randn(SIZE, 1) @ torch.randn(1, SIZE) * 0.1
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        write_json(tmp_path / folder / "config.json", {"model_type": "mystery"})
    if option is None:
        with pytest.raises(loratool.FitError, match=f"{YES} or {NO}"):
            extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
        assert not (tmp_path / "out").exists()
        return
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1, fan_in_fan_out=option)
    wrapped = PeftModel.from_pretrained(own_model(), str(tmp_path / "out"))
    merged = wrapped.merge_and_unload().state_dict()
    wanted = read_tensors(tmp_path / "tuned")
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-5) for name in wanted)


# (config, c_attn stored (in, out), fan_in_fan_out) → how it is taken, or what the refusal proposes
EXTRACTED: dict[str, tuple[dict[str, Any], bool, bool | None, bool | str]] = {
    "class": ({"model_type": "gpt2"}, True, None, True),
    "class of nn.Linear": ({"model_type": "gpt_bigcode"}, False, None, False),
    "bias": ({"model_type": "mystery"}, True, None, True),
    "other bias": ({"model_type": "mystery"}, False, None, False),
    "class against bias": ({"model_type": "gpt2"}, False, None, NO),
    "other class against bias": ({"model_type": "gpt_neo"}, True, None, YES),
    "option against bias": ({"model_type": "mystery"}, True, False, YES),
    "option and bias against class": ({"model_type": "gpt2"}, False, False, False),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_extract_believes_whom_merge_believes(name: str, tmp_path: Path) -> None:
    """The factors of a square c_proj lie as those beside it, and `fan_in_fan_out` says how; contradictions are refused."""
    config, in_out, option, wanted = EXTRACTED[name]
    shape = (SIZE, 3 * SIZE) if in_out else (3 * SIZE, SIZE)
    torch.manual_seed(0)
    base = {
        f"{WIDE}.weight": torch.randn(shape),
        f"{WIDE}.bias": torch.randn(3 * SIZE),
        f"{SQUARE}.weight": torch.randn(SIZE, SIZE),
    }
    update = torch.randn(SIZE, 1) @ torch.randn(1, SIZE)
    tuned = {**base, f"{SQUARE}.weight": base[f"{SQUARE}.weight"] + update}
    tuned[f"{WIDE}.weight"] = base[f"{WIDE}.weight"] + torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        write_json(tmp_path / folder / "config.json", config)
    paths = [tmp_path / folder for folder in ("base", "tuned", "out")]
    if isinstance(wanted, str):
        with pytest.raises(loratool.FitError, match=wanted):
            extract(*paths, rank=1, fan_in_fan_out=option)
        extract(*paths, rank=1, fan_in_fan_out=wanted == YES)
        wanted = wanted == YES
    else:
        report = extract(*paths, rank=1, fan_in_fan_out=option)
        guessed = config["model_type"] == "mystery" and option is None
        assert ("orientation-guessed" in [note.code for note in report.notes]) == guessed
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] == wanted
    found = read_tensors(tmp_path / "out")
    product = found[f"{PREFIX}{SQUARE}.lora_B.weight"] @ found[f"{PREFIX}{SQUARE}.lora_A.weight"]
    assert torch.allclose(product.T if wanted else product, update, atol=1e-5)
