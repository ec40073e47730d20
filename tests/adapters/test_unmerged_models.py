"""Full models that were saved with PEFT's layers still in them: what they are called, and how they are folded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_base, randomise
from torch import Tensor

import loratool
from loratool.cli import run

LLAMA = FAMILIES["llama"]
ALPHA = 6.0


def wrap(base: Path, names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """The saved base under PEFT, with an adapter of each name, trained so to speak."""
    model = LLAMA.cls.from_pretrained(base)
    wanted: dict[str, Any] = {"r": 3, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped: Any = get_peft_model(model, LoraConfig(**wanted), names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LoraConfig(**wanted))
    for number, name in enumerate(names):
        wrapped.set_adapter(name)
        randomise(wrapped, number + 1)
    wrapped.set_adapter(names[0])
    return wrapped.eval()


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A model folder with these tensors, over some files with an index, and the config of a llama."""
    folder.mkdir()
    names = sorted(tensors)
    files: dict[str, str] = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        table = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("unmerged") / "base", LLAMA)


def by_peft(wrapped: Any, name: str) -> dict[str, Tensor]:
    """What PEFT's own merge of one adapter gives."""
    merged: dict[str, Tensor] = wrapped.merge_and_unload(adapter_names=[name]).state_dict()
    return {key: tensor.clone() for key, tensor in merged.items()}


def folded(out: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(out.glob("*.safetensors")) for k, v in load_file(path).items()}


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""], ids=["wrapped", "injected"])
def test_a_model_saved_unmerged_is_folded_as_peft_merges_it(
    base: Path, tmp_path: Path, setting: str, shards: int, prefix: str
) -> None:
    """No adapter is given: the model holds its own. α comes with --input-alpha, the renames are told."""
    if setting not in ("plain", "head saved whole") and (shards, prefix) != (1, "base_model.model."):
        pytest.skip("files and prefix do not depend on the setting")
    wrapped = wrap(base, **SETTINGS[setting])
    tensors = {k.removeprefix("base_model.model.") if not prefix else k: v for k, v in wrapped.state_dict().items()}
    model = save(tmp_path / "unmerged", {k: v.clone() for k, v in tensors.items()}, shards)
    shutil.copy(base / "config.json", model)
    report = loratool.merge(model, [], tmp_path / "out", input_alpha=ALPHA)
    check_same(folded(tmp_path / "out"), by_peft(wrapped, "default"))
    assert any(note.code == "tensors-renamed" and "base_layer" in note.text for note in report.notes)
    loaded = LLAMA.cls.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not any(loaded.values()), loaded


@pytest.mark.parametrize("place", ["beside", "in its folder"])
def test_the_config_of_the_adapter_tells_alpha_where_it_is_there(base: Path, tmp_path: Path, place: str) -> None:
    """rsLoRA and patterns count as the config says."""
    wrapped = wrap(base, use_rslora=True, alpha_pattern={"down_proj": 11})
    model = save(tmp_path / "unmerged", {k: v.clone() for k, v in wrapped.state_dict().items()})
    shutil.copy(base / "config.json", model)
    wrapped.save_pretrained(tmp_path / "adapter")
    target = model if place == "beside" else model / "default"
    target.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", target)
    loratool.merge(model, [], tmp_path / "out")
    check_same(folded(tmp_path / "out"), by_peft(wrapped, "default"))


def test_one_of_several_built_in_adapters_is_chosen_by_name(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a name the adapters are listed, with one that one is folded, and the others are told."""
    wrapped = wrap(base, ("first", "second"))
    model = save(tmp_path / "unmerged", {k: v.clone() for k, v in wrapped.state_dict().items()})
    words = ["merge", str(model), "-o", str(tmp_path / "out"), "--input-alpha", str(ALPHA)]
    assert run(words) == 2
    assert "first, second" in (told := capsys.readouterr().err)
    assert "--adapter-name" in told
    assert run([*words, "--adapter-name", "third"]) == 2
    assert run([*words, "--adapter-name", "second", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any(note["code"] == "adapters-left-out" and "first" in note["text"] for note in notes)
    check_same(folded(tmp_path / "out"), by_peft(wrapped, "second"))


@pytest.fixture(scope="module")
def unmerged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {k: v.clone() for k, v in wrap(base).state_dict().items()}
    model = save(tmp_path_factory.mktemp("saved") / "unmerged", tensors)
    shutil.copy(base / "config.json", model)
    return model


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    wrap(base).save_pretrained(folder)
    return folder


REFUSING = {
    "merge": ["merge", "UNMERGED", "ADAPTER", "-o", "OUT"],
    "plan": ["merge", "UNMERGED", "ADAPTER", "-o", "OUT", "--dry-run"],
    "extract, base": ["extract", "UNMERGED", "BASE", "-o", "OUT"],
    "extract, tuned": ["extract", "BASE", "UNMERGED", "-o", "OUT"],
    "estimate": ["estimate", "UNMERGED", "--rank", "2", "--target", "q_proj"],
    "inspect": ["inspect", "ADAPTER", "--base", "UNMERGED"],
    "push": ["push", "UNMERGED", "me/model", "--dry-run"],
}


@pytest.mark.parametrize("command", REFUSING)
def test_a_model_saved_unmerged_is_refused_with_the_way_out(
    base: Path,
    unmerged: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """As a base, and to be pushed: what it is, and the command that folds it."""
    places = {"BASE": base, "UNMERGED": unmerged, "ADAPTER": adapter, "OUT": tmp_path / "out"}
    assert run([str(places.get(word, word)) for word in REFUSING[command]]) == 3
    told = capsys.readouterr().err
    assert "unmerged" in told
    assert f"loratool merge {unmerged} -o OUT" in told
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_it_is_and_a_check_finds_a_problem(
    unmerged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect has a note; --check ends with 3 and gives the command that repairs it."""
    assert run(["inspect", str(unmerged)]) == 0
    assert "unmerged" in capsys.readouterr().out
    assert run(["inspect", str(unmerged), "--check", "--json"]) == 3
    (facts,) = json.loads(capsys.readouterr().out)["results"]
    (found,) = (finding for finding in facts["findings"] if finding["code"] == "unmerged-model")
    assert found["level"] == "problem"
    assert found["repair"].startswith("loratool merge")


def test_without_its_alpha_it_is_refused_and_the_option_is_named(
    unmerged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing guesses the strength of an adapter; the plan refuses as the merge does."""
    for more in ([], ["--dry-run"]):
        assert run(["merge", str(unmerged), "-o", str(tmp_path / "out"), *more]) == 3
        assert "--input-alpha" in capsys.readouterr().err
    assert run(["merge", str(unmerged), "-o", str(tmp_path / "out"), "--input-alpha", "6", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_merged_into_the_base_that_it_names(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One operand that is an adapter means --base auto."""
    config = adapter / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(base)
    for number, operands in enumerate(([str(adapter)], ["auto", str(adapter)])):
        assert run(["merge", *operands, "-o", str(tmp_path / f"out{number}")]) == 0
        assert f"note  {' ' * 13}{base} is read as the base, because the adapter names it" in capsys.readouterr().out
        assert "base-named" not in (tmp_path / f"out{number}" / "loratool.json").read_text()  # whose command names it
    check_same(folded(tmp_path / "out0"), folded(tmp_path / "out1"))
    report = loratool.merge_many("auto", {tmp_path / "out2": adapter})
    assert "base-named" in {note.code for each in report.reports.values() for note in each.notes}
    assert "base-named" not in {note.code for note in loratool.plan(base, adapter).notes}


def test_any_other_operand_alone_is_wrong_usage(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain model has nothing to fold: exit 2, and what is missing."""
    assert run(["merge", str(base), "-o", str(tmp_path / "out")]) == 2
    assert "ADAPTER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_users_module_called_base_layer_makes_no_model_unmerged(tmp_path: Path) -> None:
    """Only PEFT's factors next to a base_layer do."""
    tensors = {"encoder.base_layer.weight": torch.ones(2, 2), "encoder.lora_head.weight": torch.ones(2, 2)}
    facts: Any = loratool.inspect(save(tmp_path / "model", tensors), check=True)
    assert not facts.findings


@pytest.mark.parametrize("held", [True, False], ids=["alpha held", "alpha missing"])
def test_an_adapter_whose_config_lacks_alpha_takes_the_one_that_is_given(
    base: Path, adapter: Path, tmp_path: Path, held: bool
) -> None:
    """--input-alpha is α where the config has none; where it has one, that one counts and a note says so."""
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    if not held:
        del config["lora_alpha"]
    (copied / "adapter_config.json").write_text(json.dumps(config))
    given = 99.0 if held else ALPHA
    report = loratool.merge(base, copied, tmp_path / "out", input_alpha=given)
    assert any(note.code == "input-alpha-not-used" for note in report.notes) == held
    loaded: Any = PeftModel.from_pretrained(LLAMA.cls.from_pretrained(base), adapter)
    check_same(folded(tmp_path / "out"), by_peft(loaded, "default"))
