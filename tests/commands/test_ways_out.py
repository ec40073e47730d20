"""What a refusal advises works: each way out is followed to its end, with PEFT where it names PEFT."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from malformed import A_VALUES, B_VALUES, QUERY, SHARDS, f32, write_adapter, write_sharded
from oracle import read_tensors
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_zoo import Pair, make_zoo, save_base, shake, train

import loratool
from loratool.adapters.formats.peft import methods
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
ONE = ["linear"]
# A config of each type on one layer whose update no command that reworks factors can take as it is.
REWORKED: dict[str, Callable[[], Any]] = {
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=ONE, init_r=4, target_r=2, total_step=10),
    "BOFT": lambda: peft.BOFTConfig(target_modules=ONE, boft_block_size=4),
    "C3A": lambda: peft.C3AConfig(target_modules=ONE, block_size=4),
    "DEFT": lambda: peft.DeftConfig(target_modules=ONE, r=3),
    "DELORA": lambda: peft.DeloraConfig(target_modules=ONE, r=3),
    "FOURIERFT": lambda: peft.FourierFTConfig(target_modules=ONE, n_frequency=30),
    "FROD": lambda: peft.FrodConfig(target_modules=ONE, progressbar=False),
    "GLORA": lambda: peft.GloraConfig(target_modules=ONE, r=3),
    "GRALORA": lambda: peft.GraloraConfig(target_modules=ONE, r=4, gralora_k=2),
    "HIRA": lambda: peft.HiraConfig(target_modules=ONE, r=3),
    "HRA": lambda: peft.HRAConfig(target_modules=ONE, r=4),
    "IA3": lambda: peft.IA3Config(target_modules=ONE, feedforward_modules=[]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=ONE, r=3),
    "LOKR": lambda: peft.LoKrConfig(target_modules=ONE, r=2),
    "MISS": lambda: peft.MissConfig(target_modules=ONE, r=3),
    "OFT": lambda: peft.OFTConfig(target_modules=ONE, oft_block_size=2),
    "OSF": lambda: peft.OSFConfig(target_modules=ONE, effective_rank=3),
    "PEANUT": lambda: peft.PeanutConfig(target_modules=ONE, r=3, depth=1),
    "PVERA": lambda: peft.PveraConfig(target_modules=ONE, r=4),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=ONE, r=4, randlora_alpha=9),
    "ROAD": lambda: peft.RoadConfig(target_modules=ONE, group_size=8),
    "SHIRA": lambda: peft.ShiraConfig(target_modules=ONE, r=2),
    "SUPERTUNING": lambda: peft.SupertuningConfig(target_modules=ONE, sparsity=0.9, r=3),
    "TINYLORA": lambda: peft.TinyLoraConfig(target_modules=ONE),
    "UNILORA": lambda: peft.UniLoraConfig(target_modules=ONE, r=3, save_indices=True),
    "VBLORA": lambda: peft.VBLoRAConfig(target_modules=ONE, r=3, num_vectors=7, vector_length=4, topk=3),
    "VERA": lambda: peft.VeraConfig(target_modules=ONE, r=4),
    "WAVEFT": lambda: peft.WaveFTConfig(target_modules=ONE, n_frequency=30),
    "PiSSA": lambda: LoraConfig(target_modules=ONE, init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(target_modules=ONE, init_lora_weights="olora"),
    "KaSA": lambda: LoraConfig(target_modules=ONE, r=3, kasa_config=peft.KasaConfig()),
}
WITHOUT_FACTORS = {"BEFT", "LN_TUNING", "TRAINABLE_TOKENS"}  # biases, norms and rows, which are carried over


def test_every_type_that_is_merged_is_here() -> None:
    """Types whose updates are replacements or biases alone need no way out: they have no factors to rework."""
    types = {name for name in REWORKED if name.isupper()}
    assert types == set(methods.METHODS) - WITHOUT_FACTORS


@pytest.mark.parametrize("name", REWORKED)
def test_an_update_that_cannot_be_reworked_is_once_it_was_merged_and_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`resize` either takes an adapter, or says which two commands make LoRA of it.

    With the names put in these run as they stand, and what they make is resized, and merges to what PEFT merges.
    """
    pair = train(tmp_path, make_zoo(), REWORKED[name]())
    if run(["resize", str(pair.adapter), "-o", str(tmp_path / "resized"), "--rank", "2"]) == 0:
        return  # it has factors after all
    message = capsys.readouterr().err
    assert "loratool merge" in message, message
    names = {"BASE": pair.base, "ADAPTER": pair.adapter, "MERGED": tmp_path / "m", "LORA": tmp_path / "lora"}
    for command in ("loratool merge BASE ADAPTER -o MERGED", "loratool extract BASE MERGED -o LORA"):
        assert command in message
        words = [str(names.get(word, word)) for word in shlex.split(command)[1:]]
        assert run([*words, *(["--rank", "8"] if words[0] == "extract" else [])]) == 0
    assert run(["resize", str(names["LORA"]), "-o", str(tmp_path / "small"), "--rank", "2"]) == 0
    loratool.merge(pair.base, [names["LORA"]], tmp_path / "again")
    assert_close(read_tensors(tmp_path / "again"), pair)


# Types with factors, but no α per module that could say how strong they are.
WITHOUT_ALPHA = ("DELORA", "TINYLORA", "UNILORA", "VBLORA")
REBASED: dict[str, Callable[[], Any]] = {**REWORKED, "LORA": lambda: LoraConfig(target_modules=ONE, r=3)}


@pytest.mark.parametrize("name", REBASED)
def test_an_adapter_of_any_type_is_rebased_or_refused_with_a_way_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Onto a base that holds 3/10 of the update; what is written makes of it what the adapter makes of its own base.

    Where the update cannot be rebased, the target and the kind of update are named, and no file is written; where only
    its strength has no place, the hint is a command that makes an adapter of it that is rebased.
    """
    pair = train(tmp_path, make_zoo(), REBASED[name]())
    loratool.merge(pair.base, pair.adapter, tmp_path / "next", weights=0.3)
    words = ["--from", str(pair.base), "--onto", str(tmp_path / "next"), "--force", "-o", str(tmp_path / "out")]
    adapter = pair.adapter
    if code := run(["rebase", str(adapter), *words]):
        assert code == 3
        assert not (tmp_path / "out").exists()
        said, _, hint = capsys.readouterr().err.rpartition("hint: ")
        if name not in WITHOUT_ALPHA:
            assert "cannot rebase this adapter" in said
            assert "linear.weight" in said
            return
        adapter = tmp_path / "lora"
        assert run([str(adapter) if word == "LORA" else word for word in shlex.split(hint)[1:]]) == 0
        assert run(["rebase", str(adapter), *words]) == 0
    assert name in (*WITHOUT_ALPHA, "LORA", "ADALORA")
    loratool.merge(tmp_path / "next", tmp_path / "out", tmp_path / "again")
    assert_close(read_tensors(tmp_path / "again"), pair)


def assert_close(found: dict[str, torch.Tensor], pair: Pair) -> None:
    for name, wanted in pair.merged.items():
        assert float((found[name] - wanted).abs().max()) <= 1e-4, name


# type → (a config that leaves out what the merge needs, the field that the message says to set)
LEFT_OUT: dict[str, tuple[Callable[[], Any], str]] = {
    "RANDLORA": (lambda: peft.RandLoraConfig(target_modules=ONE, r=4, save_projection=False), "save_projection"),
    "TINYLORA": (lambda: peft.TinyLoraConfig(target_modules=ONE, save_projection=False), "save_projection"),
    "UNILORA": (lambda: peft.UniLoraConfig(target_modules=ONE, r=3, save_indices=False), "save_indices"),
    "SUPERTUNING": (
        lambda: peft.SupertuningConfig(target_modules=ONE, sparsity=0.9, save_precomputed_indices=False),
        "save_precomputed_indices",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_an_adapter_left_out_is_saved_by_the_config_that_the_message_asks_for(tmp_path: Path, name: str) -> None:
    make, field = LEFT_OUT[name]
    pair = train(tmp_path, make_zoo(), make())
    with pytest.raises(loratool.InputError, match=rf"config\.{field} = True"):
        pair.merge(tmp_path / "refused")
    config = PeftConfig.from_pretrained(pair.adapter)
    setattr(config, field, True)
    PeftModel.from_pretrained(make_zoo(), pair.adapter, config=config).save_pretrained(tmp_path / "saved")
    loratool.merge(pair.base, [tmp_path / "saved"], tmp_path / "out")
    assert_close(read_tensors(tmp_path / "out"), pair)


# What only PEFT can merge, and says so.
BY_PEFT: dict[str, Callable[[], Any]] = {
    "PSOFT": lambda: peft.PsoftConfig(target_modules=ONE, r=3),
    "ADAMSS": lambda: peft.AdamssConfig(target_modules=ONE, r=3),
    "VERA": lambda: peft.VeraConfig(target_modules=ONE, r=4, save_projection=False),
    "PVERA": lambda: peft.PveraConfig(target_modules=ONE, r=4, save_projection=False),
    "FROD": lambda: peft.FrodConfig(target_modules=ONE, save_projection=False, progressbar=False),
    "WAVEFT": lambda: peft.WaveFTConfig(target_modules=ONE, n_frequency=30, wavelet_family="coif2"),
    "PEANUT": lambda: peft.PeanutConfig(target_modules=ONE, r=3, act_fn="laplace"),
}


@pytest.mark.parametrize("name", BY_PEFT)
def test_what_only_peft_merges_is_merged_by_peft(tmp_path: Path, name: str) -> None:
    """The message names `merge_and_unload`; it runs on the files, and `extract` makes LoRA of its result."""
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    pair = train(tmp_path, make_zoo(), BY_PEFT[name]())
    with pytest.raises(loratool.InputError, match="merge it with PEFT's merge_and_unload"):
        pair.merge(tmp_path / "refused")
    merged = PeftModel.from_pretrained(make_zoo(), pair.adapter).merge_and_unload()
    save_base(tmp_path / "merged", merged)
    loratool.extract(pair.base, tmp_path / "merged", tmp_path / "lora", rank=8)
    loratool.merge(pair.base, [tmp_path / "lora"], tmp_path / "again")
    assert_close(read_tensors(tmp_path / "again"), pair)


def test_a_random_pissa_is_plain_lora_where_peft_saves_it_with_the_adapter_before_training(tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` takes the adapter as it was before training, and is what is merged."""
    zoo = make_zoo()
    base = save_base(tmp_path / "base", zoo)
    torch.manual_seed(3)
    wrapped = get_peft_model(copy.deepcopy(zoo), LoraConfig(target_modules=ONE, init_lora_weights="pissa_niter_4"))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "before")
    wrapped.peft_config["default"].init_lora_weights = "pissa_niter_4"
    shake(wrapped, 3, 0.1)
    wrapped.save_pretrained(tmp_path / "as it is")
    with pytest.raises(loratool.InputError, match="path_initial_model_for_weight_conversion"):
        loratool.merge(base, [tmp_path / "as it is"], tmp_path / "refused")
    before = str(tmp_path / "before")
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=before)
    loratool.merge(base, [tmp_path / "plain"], tmp_path / "out")
    wanted = wrapped.merge_and_unload().state_dict()
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert float((tensor - wanted[name]).abs().max()) <= 1e-5, name


def test_one_shard_as_a_base_leads_to_the_folder_of_all_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    with pytest.raises(loratool.FitError) as caught:
        loratool.plan(tmp_path / "base" / SHARDS[1], tmp_path / "adapter", tmp_path / "out")
    assert "BASE is one of 2 shards" in str(caught.value)
    assert "pass the folder of all shards" in str(caught.value)
    assert "--map" not in str(caught.value)
    assert loratool.plan(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_the_name_of_an_adapter_that_has_none_is_not_ignored_in_silence(tmp_path: Path, form: str) -> None:
    write_adapter(tmp_path / "adapter")
    if form == "mlx":
        tensors = {f"{QUERY}.lora_a": f32(A_VALUES.T), f"{QUERY}.lora_b": f32(B_VALUES.T)}
        write_adapter(tmp_path / "adapter", tensors, lora_parameters={"rank": 2, "scale": 2.0})
        (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapters.safetensors")
    facts = loratool.inspect(tmp_path / "adapter", adapter_name="style")
    assert isinstance(facts, loratool.AdapterFacts)
    assert facts.format == form
    assert [note.text for note in facts.notes if note.code == "adapter-name-not-used"] == [
        "there is only one adapter, and it has no name, so --adapter-name style is ignored"
    ]


def test_the_name_of_an_adapter_that_is_not_there_is_refused_and_those_that_are_there_are_listed(
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path / "run" / "first")
    with pytest.raises(loratool.UsageError, match=r"has no adapter 'second'; it has first"):
        loratool.inspect(tmp_path / "run", adapter_name="second")
    facts = loratool.inspect(tmp_path / "run", adapter_name="first")
    assert "adapter-name-not-used" not in {note.code for note in facts.notes}  # type: ignore[union-attr]
