"""How the experts' columns of a fused lora_B are packed: as the config says, as the caller says, and never guessed unsaid."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import BOTH, EXPERTS, FUSED, INPUTS, Layers
from oracle import read_tensors
from peft import LoraConfig, PeftConfig, PeftModel
from peft_files import save_peft
from peft_zoo import Pair, train
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
FIELDS = {"lora_B_layout", "lora_A_layout", "unsloth_fused_expert_lora"}


def detail(layout: str, **more: object) -> dict[str, Any]:
    parameters = {name: {"lora_B_layout": layout, "num_experts": EXPERTS, **more} for name in FUSED}
    return {"unsloth_fused_expert_lora": {"lora_A_layout": "grouped_by_expert", "parameters": parameters}}


# What says that columns are packed by expert: fields of the config, or the caller.
SAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the field": ({"lora_B_layout": "grouped_by_expert"}, {}),
    "the field of each parameter": (detail("grouped_by_expert"), {}),
    "the field of each parameter against the one for all": (
        {"lora_B_layout": "rank_major", **detail("grouped_by_expert")},
        {},
    ),
    "the option": ({}, {"expert_layout": "grouped-by-expert"}),
    "the option against the field": ({"lora_B_layout": "rank_major"}, {"expert_layout": "grouped-by-expert"}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return trained(tmp_path_factory.mktemp("experts"))


def model() -> Layers:
    torch.manual_seed(5)
    return Layers(FUSED).eval()


def trained(folder: Path, rank: int = 2) -> Pair:
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=["q_proj"], target_parameters=BOTH)
    return train(folder, model(), config, INPUTS)


def by_expert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same factors with column k·E + e of every fused lora_B at e·r + k."""
    found = dict(tensors)
    for name, b in tensors.items():
        if "experts" in name and "lora_B" in name:
            found[name] = b.reshape(b.shape[0], -1, EXPERTS).transpose(1, 2).reshape(b.shape).contiguous()
    return found


def written(pair: Pair, folder: Path, packed: bool = True, **config: Any) -> Path:
    """The adapter with its columns packed by expert, or as they were, under a config with more fields."""
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    table = json.loads((pair.adapter / "adapter_config.json").read_text())
    return save_peft(folder, by_expert(tensors) if packed else tensors, **{**table, **config})


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("name", SAYS)
def test_columns_packed_by_expert_are_merged_as_peft_merges_its_own(pair: Pair, tmp_path: Path, name: str) -> None:
    fields, options = SAYS[name]
    loratool.merge(pair.base, [written(pair, tmp_path / "packed", **fields)], tmp_path / "out", **options)
    assert_close(read_tensors(tmp_path / "out"), pair.merged)


def test_the_field_may_say_what_peft_does(pair: Pair, tmp_path: Path) -> None:
    adapter = written(pair, tmp_path / "plain", packed=False, lora_B_layout="rank_major", **detail("rank_major"))
    loratool.merge(pair.base, [adapter], tmp_path / "out")
    assert_close(read_tensors(tmp_path / "out"), pair.merged)


Rework = Callable[..., object]
REWORKED: dict[str, tuple[Rework, float]] = {
    "rescale": (lambda source, out, **way: loratool.rescale(source, out, scale=0.5, **way), 0.5),
    "rescale, baked": (lambda source, out, **way: loratool.rescale(source, out, scale=0.5, bake=True, **way), 0.5),
    "resize": (lambda source, out, **way: loratool.resize(source, out, rank=4, **way), 1.0),
    "combine": (lambda source, out, **way: loratool.combine([source, source], out, weights=[1.0, 0.5], **way), 1.5),
}


@pytest.mark.parametrize("says", ["the field", "the option"])
@pytest.mark.parametrize("name", REWORKED)
def test_outputs_are_packed_as_peft_packs_and_do_without_the_field(
    pair: Pair, tmp_path: Path, name: str, says: str
) -> None:
    """PEFT loads each output, and its merge of it is W + k · ΔW, ΔW being that of the adapter before it was packed."""
    fields, options = SAYS[says]
    rework, strength = REWORKED[name]
    rework(written(pair, tmp_path / "packed", **fields), tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not FIELDS & set(config)
    merged = PeftModel.from_pretrained(copy.deepcopy(model()), tmp_path / "out").merge_and_unload().state_dict()
    assert_close(merged, {n: w + strength * (pair.merged[n] - w) for n, w in pair.before.items()})


def test_a_field_that_says_what_peft_does_is_not_carried_over(pair: Pair, tmp_path: Path) -> None:
    adapter = written(pair, tmp_path / "plain", packed=False, lora_B_layout="rank_major")
    loratool.rescale(adapter, tmp_path / "out", scale=2.0)
    assert not FIELDS & set(json.loads((tmp_path / "out" / "adapter_config.json").read_text()))


def test_an_adapter_compared_with_itself_packed_otherwise_is_the_same(pair: Pair, tmp_path: Path) -> None:
    adapter = written(pair, tmp_path / "packed", lora_B_layout="grouped_by_expert")
    (totals,) = loratool.compare([pair.adapter, adapter]).totals.values()
    assert totals.cosine == pytest.approx(1.0, abs=1e-6)


def test_norms_that_inspect_measures_are_those_of_the_packed_update(pair: Pair, tmp_path: Path) -> None:
    """The largest singular value of a parameter's update is that of what PEFT's merge changes."""
    adapter = written(pair, tmp_path / "packed", lora_B_layout="grouped_by_expert")
    facts = loratool.inspect(adapter, values=True)
    assert isinstance(facts, loratool.AdapterFacts)
    assert facts.values is not None
    found = {module.target: module.spectral for module in facts.values.modules if "experts" in module.target}
    assert len(found) == 2 * len(BOTH)
    for target, spectral in found.items():
        change = (pair.merged[target] - pair.before[target]).double()
        assert spectral == pytest.approx(float(torch.linalg.matrix_norm(change, ord=2).max()), rel=1e-4)


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "another layout": (
        {"lora_B_layout": "mixed"},
        "lora_B_layout is 'mixed', expected rank_major or grouped_by_expert",
    ),
    "not text": ({"lora_B_layout": 3}, "lora_B_layout is 3"),
    "another layout of A": ({"lora_A_layout": "rank_major"}, "lora_A_layout is 'rank_major'"),
    "another layout of a parameter": (detail("mixed"), "parameters.gate_up_proj.lora_B_layout is 'mixed'"),
    "another layout of A in detail": (
        {"unsloth_fused_expert_lora": {"lora_A_layout": "rank_major"}},
        "unsloth_fused_expert_lora.lora_A_layout is 'rank_major'",
    ),
    "details that are none": ({"unsloth_fused_expert_lora": "yes"}, "unsloth_fused_expert_lora is 'yes'"),
    "a field of next year": (
        {"gate_up_layout": "interleaved"},
        "gate_up_layout is 'interleaved', which is unknown",
    ),
}


@pytest.mark.parametrize("command", ["merge", "rescale", "resize", "combine", "compare"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_value_of_a_field_about_packing_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    fields, told = UNKNOWN[name]
    adapter, out = str(written(pair, tmp_path / "odd", **fields)), str(tmp_path / "out")
    words = {
        "merge": [str(pair.base), adapter, "-o", out],
        "rescale": [adapter, "-o", out, "--scale", "2"],
        "resize": [adapter, "-o", out, "--rank", "1"],
        "combine": [adapter, str(pair.adapter), "-o", out],
        "compare": [adapter, str(pair.adapter)],
    }
    assert run([command, *words[command]]) == 3
    assert told in capsys.readouterr().err
    assert not Path(out).exists()


def test_no_config_of_peft_has_a_field_that_this_refuses() -> None:
    """Fields with "layout" in their name are taken to say how tensors are packed; PEFT's configs have none."""
    configs: list[Any] = [kind for _, kind in inspect.getmembers(peft, inspect.isclass) if issubclass(kind, PeftConfig)]
    assert len(configs) > 20
    for kind in configs:
        assert not [field.name for field in dataclasses.fields(kind) if "layout" in field.name]


TRACES: dict[str, tuple[dict[str, Any], str, str]] = {
    "auto_mapping": ({"auto_mapping": {"base_model_class": "M", "unsloth_fixed": True}}, "", "auto_mapping"),
    "the base's name": ({"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}, "", "its base is one of Unsloth's"),
    "README.md": ({}, "---\ntags:\n- unsloth\n---\n", "README.md names Unsloth"),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_of_a_writer_that_packed_otherwise_are_told(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Without the field the report, its record and a warning say what was assumed, and which option decides it.

    Following that option gives what was trained; naming what is assumed gives the same result without the note.
    """
    fields, readme, told = TRACES[name]
    adapter = written(pair, tmp_path / "traced", **fields)
    (adapter / "README.md").write_text(readme)
    words = ["merge", str(pair.base), str(adapter), "-o"]
    assert run([*words, str(tmp_path / "assumed")]) == 0
    warning = capsys.readouterr().err
    assert "warning" in warning
    assert told in warning
    assert "--expert-layout grouped-by-expert" in warning
    notes = json.loads((tmp_path / "assumed" / "loratool.json").read_text())["notes"]
    assert "expert-layout-assumed" in {note["code"] for note in notes}
    assert run([*words, str(tmp_path / "said"), "--expert-layout", "grouped-by-expert"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert_close(read_tensors(tmp_path / "said"), pair.merged)
    report = loratool.merge(pair.base, [adapter], tmp_path / "confirmed", expert_layout="rank-major")
    assert "expert-layout-assumed" not in {note.code for note in report.notes}
    assert_close(read_tensors(tmp_path / "confirmed"), read_tensors(tmp_path / "assumed"))


def test_where_both_packings_are_one_nothing_is_told(tmp_path: Path) -> None:
    """Of rank 1 the columns of both packings are the same, so that traces of a writer mean nothing."""
    pair = trained(tmp_path, rank=1)
    adapter = written(pair, tmp_path / "traced", auto_mapping={"unsloth_fixed": True})
    report = loratool.merge(pair.base, [adapter], tmp_path / "out")
    assert not [note for note in report.notes if note.code.startswith("expert-layout")]
    assert_close(read_tensors(tmp_path / "out"), pair.merged)


def test_an_option_against_the_field_is_told(pair: Pair, tmp_path: Path) -> None:
    adapter = written(pair, tmp_path / "packed", lora_B_layout="rank_major")
    report = loratool.merge(pair.base, [adapter], tmp_path / "out", expert_layout="grouped-by-expert")
    (note,) = [note for note in report.notes if note.code == "expert-layout-overridden"]
    assert "adapter_config.json says rank-major" in note.text


def test_a_number_of_experts_that_the_factors_deny_is_refused(pair: Pair, tmp_path: Path) -> None:
    adapter = written(pair, tmp_path / "packed", **detail("grouped_by_expert", num_experts=3))
    with pytest.raises(loratool.InputError, match="says that there are 3 experts"):
        loratool.merge(pair.base, [adapter], tmp_path / "out")


def test_check_says_that_others_misread_it_and_what_repairs_it(pair: Pair, tmp_path: Path) -> None:
    """The command that `inspect --check` names writes an adapter that PEFT merges to what was trained."""
    adapter = written(pair, tmp_path / "packed", lora_B_layout="grouped_by_expert")
    facts = loratool.inspect(adapter, check=True)
    assert isinstance(facts, loratool.AdapterFacts)
    (finding,) = [finding for finding in facts.findings or () if finding.code == "expert-packing"]
    words = shlex.split(finding.repair)
    assert words[0] == "loratool"
    assert run([str(tmp_path / "out") if word == "OUT" else word for word in words[1:]]) == 0
    merged = PeftModel.from_pretrained(copy.deepcopy(model()), tmp_path / "out").merge_and_unload().state_dict()
    assert_close(merged, pair.merged)
