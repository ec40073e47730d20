"""Tied embeddings, resized vocabularies and single token rows: the merged files say what the unmerged adapter said.

The oracle is transformers: it loads what was merged, with nothing missing or made up, and its logits are compared
with those of the model under the adapter. On tied embeddings PEFT's own merge is wrong, so it is no oracle here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import PREFIX, picture, read_tensors, same_bits
from tiny_models import (
    FAMILIES,
    HIDDEN,
    SIZES,
    TOKENS,
    VOCABULARY,
    Family,
    adapt,
    bert_config,
    bloom_config,
    build_base,
    llama_config,
    load,
    opt_config,
    output_of,
)
from torch import Tensor

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BIGGER = VOCABULARY + 4
NEW_TOKENS = torch.tensor([[5, VOCABULARY, 3, BIGGER - 1, 41, 9], [1, 60, VOCABULARY + 1, 7, 33, BIGGER - 2]])


def gemma_config() -> Any:
    return transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8)


# name → (the family, its embedding, its head)
TIED: dict[str, tuple[Family, str, str]] = {
    "llama": (FAMILIES["tied llama"], "model.embed_tokens", "lm_head"),
    "gpt2": (FAMILIES["gpt2"], "transformer.wte", "lm_head"),
    "gemma3": (Family(gemma_config, "Gemma3ForCausalLM", {}), "model.embed_tokens", "lm_head"),
    "opt": (Family(opt_config, "OPTForCausalLM", {}), "model.decoder.embed_tokens", "lm_head"),
    "bloom": (Family(bloom_config, "BloomForCausalLM", {}), "transformer.word_embeddings", "lm_head"),
}
UNTIED = FAMILIES["llama"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            family = UNTIED if name == "untied" else TIED[name][0]
            made[name] = build_base(tmp_path_factory.mktemp("vocabulary") / "base", family)
        return made[name]

    return of


def tell(
    family: Family, base: Path, out: Path, tokens: Tensor = TOKENS, resize: int = 0, saving: Any = None, **settings: Any
) -> Tensor:
    """Save an adapter to `out` and return the logits of the unmerged model."""
    model = load(family, base)
    plain = output_of(model, {"input_ids": tokens.clamp_max(VOCABULARY - 1)})
    if resize:
        torch.manual_seed(9)
        model.resize_token_embeddings(resize, mean_resizing=False)
    wrapped = adapt(model, **settings)
    wrapped.save_pretrained(out, **(saving or {}))
    said = output_of(wrapped, {"input_ids": tokens})
    if said.shape == plain.shape:
        assert float((said - plain).abs().max()) > 0.01 * float(said.abs().max()), "the adapter says nothing"
    return said


def assert_says(family: Family, merged: Path, said: Tensor, tokens: Tensor = TOKENS) -> None:
    found = output_of(load(family, merged), {"input_ids": tokens})
    assert found.shape == said.shape
    assert float((found - said).abs().max()) <= 1e-5 * float(said.abs().max())


def is_tied(merged: Path) -> bool:
    """By the files: one tensor, and the config says that it is both."""
    config = json.loads((merged / "config.json").read_text())
    return (
        not any("lm_head" in name for name in read_tensors(merged)) and config.get("tie_word_embeddings") is not False
    )


# -- tied embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["embedding", "head", "both"])
@pytest.mark.parametrize("name", TIED)
def test_lora_on_one_side_of_tied_embeddings_changes_that_side_only(
    bases: Callable[[str], Path], tmp_path: Path, name: str, side: str
) -> None:
    family, embedding, head = TIED[name]
    targets = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[side]
    said = tell(
        family,
        bases(name),
        tmp_path / "adapter",
        saving={"save_embedding_layers": False},
        target_modules=targets,
        fan_in_fan_out=False,
    )
    loratool.merge(bases(name), tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said)
    assert not is_tied(tmp_path / "out")
    before, after = read_tensors(bases(name)), read_tensors(tmp_path / "out")
    (stored,) = [n for n in before if n.endswith(f"{embedding.rpartition('.')[2]}.weight")]
    assert same_bits(before[stored], after[stored]) == (side == "head")


def test_an_embedding_that_peft_saved_besides_its_factors_is_no_second_change(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    family, base = TIED["llama"][0], bases("llama")
    said = tell(family, base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    assert f"{PREFIX}model.embed_tokens.base_layer.weight" in read_tensors(tmp_path / "adapter")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_ensure_weight_tying_merges_the_shared_change_once_and_stays_tied(
    bases: Callable[[str], Path], tmp_path: Path, target: str
) -> None:
    family, base = TIED["llama"][0], bases("llama")
    settings: dict[str, Any] = {"target_modules": ["q_proj", target], "ensure_weight_tying": True}
    said = tell(family, base, tmp_path / "adapter", **settings)
    keys = read_tensors(tmp_path / "adapter")
    if not any("lora_embedding_A" in key for key in keys):
        pytest.skip("PEFT ties from the embedding's side only")
    assert any("lm_head.lora_A" in key for key in keys)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert is_tied(tmp_path / "out")
    assert_says(family, tmp_path / "out", said)
    a, b = (keys[f"{PREFIX}model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    wanted = read_tensors(base)["model.embed_tokens.weight"].double() + (b @ a).T * 6 / 4
    found = read_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert float((found.double() - wanted).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    "saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=["embedding", "head", "both"]
)
def test_a_saved_side_of_tied_embeddings_replaces_that_side_only(
    bases: Callable[[str], Path], tmp_path: Path, saved: list[str]
) -> None:
    family, base = TIED["llama"][0], bases("llama")
    said = tell(family, base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=saved)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said)


def test_saved_modules_that_peft_kept_tied_stay_one_tensor(bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, base = TIED["llama"][0], bases("llama")
    settings: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    said = tell(family, base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    keys = read_tensors(tmp_path / "adapter")
    assert same_bits(keys[f"{PREFIX}model.embed_tokens.weight"], keys[f"{PREFIX}lm_head.weight"])
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert is_tied(tmp_path / "out")
    assert_says(family, tmp_path / "out", said)


def test_models_whose_output_is_scaled_by_being_tied_are_not_untied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES["t5"]
    base = build_base(tmp_path / "base", family)
    wrapped = adapt(load(family, base), target_modules=["lm_head", "q"])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    before = picture(tmp_path)
    assert run(["merge", str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 4
    message = capsys.readouterr().err
    assert "lm_head" in message
    assert "tie" in message
    assert picture(tmp_path) == before


# -- rows of single tokens ---------------------------------------------------------------------------

ROWS: dict[str, Any] = {
    "a list": [90, 3, 17],
    "the embedding alone": {"embed_tokens": [90, 3]},
    "the embedding and the head": {"embed_tokens": [90, 3], "lm_head": [5]},
    "the same rows of both": {"embed_tokens": [5, 17], "lm_head": [5, 17]},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["llama", "untied"])
def test_rows_of_tokens_replace_the_rows_of_the_base_in_the_order_of_the_config(
    bases: Callable[[str], Path], tmp_path: Path, name: str, rows: str
) -> None:
    family = UNTIED if name == "untied" else TIED[name][0]
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": ROWS[rows]}
    said = tell(family, bases(name), tmp_path / "adapter", **settings)
    loratool.merge(bases(name), tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said)
    saved = read_tensors(tmp_path / "adapter")[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"]
    index = ROWS[rows] if isinstance(ROWS[rows], list) else ROWS[rows]["embed_tokens"]
    found, before = (read_tensors(each)["model.embed_tokens.weight"] for each in (tmp_path / "out", bases(name)))
    assert same_bits(found[index], saved)
    others = [row for row in range(VOCABULARY) if row not in index]
    assert same_bits(found[others], before[others])


def test_rows_of_tokens_of_a_tied_model_stay_shared(bases: Callable[[str], Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    tell(TIED["llama"][0], bases("llama"), tmp_path / "adapter", **settings)
    loratool.merge(bases("llama"), tmp_path / "adapter", tmp_path / "out")
    assert is_tied(tmp_path / "out")


# -- another vocabulary ------------------------------------------------------------------------------

# how an adapter of a resized model names its embeddings: (settings, what must be among its keys)
RESIZED: dict[str, tuple[dict[str, Any], str]] = {
    "whole, not targeted": ({"target_modules": ["q_proj"]}, "model.embed_tokens.weight"),
    "under its factors": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "model.embed_tokens.base_layer.weight",
    ),
    "under token rows": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, VOCABULARY, BIGGER - 1]},
        "model.embed_tokens.token_adapter.base_layer.weight",
    ),
    "saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("form", RESIZED)
@pytest.mark.parametrize("name", ["llama", "untied"])
def test_a_model_with_more_tokens_merges_in_every_form_that_peft_saves(
    bases: Callable[[str], Path], tmp_path: Path, name: str, form: str
) -> None:
    family = UNTIED if name == "untied" else TIED[name][0]
    settings, key = RESIZED[form]
    said = tell(family, bases(name), tmp_path / "adapter", NEW_TOKENS, BIGGER, **settings)
    assert PREFIX + key in read_tensors(tmp_path / "adapter")
    report = loratool.merge(bases(name), tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == BIGGER
    assert read_tensors(tmp_path / "out")["model.embed_tokens.weight"].shape == (BIGGER, HIDDEN)
    assert_says(family, tmp_path / "out", said, NEW_TOKENS)
    assert any("vocab" in note for note in map(str, report.notes)), report.notes


def test_a_tied_model_takes_the_new_rows_of_an_adapted_embedding_for_its_head_too(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    family = TIED["llama"][0]
    said = tell(family, bases("llama"), tmp_path / "adapter", NEW_TOKENS, BIGGER, target_modules=["embed_tokens"])
    assert not any("lm_head" in key for key in read_tensors(tmp_path / "adapter"))
    loratool.merge(bases("llama"), tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said, NEW_TOKENS)


# -- heads that a base has not -----------------------------------------------------------------------


def test_a_new_head_is_added_only_when_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = build_base(tmp_path / "base", Family(bert_config, "BertModel", {}))
    family = FAMILIES["bert classifier"]
    torch.manual_seed(2)
    model = family.cls.from_pretrained(bare, num_labels=5).eval()
    wrapped = adapt(model, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    wrapped.save_pretrained(tmp_path / "adapter")
    said = output_of(wrapped, {"input_ids": TOKENS})
    command = ["merge", str(bare), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    assert run(command) == 4
    message = capsys.readouterr().err
    assert "classifier" in message
    assert "--allow-new-tensors" in message
    assert not (tmp_path / "out").exists()
    assert run([*command, "--allow-new-tensors"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    found = output_of(family.cls.from_pretrained(tmp_path / "out").eval(), {"input_ids": TOKENS})
    assert found.shape == said.shape == (2, 5)
    assert float((found - said).abs().max()) <= 1e-5


def test_an_adapter_of_a_tied_model_fits_a_base_that_was_saved_untied(tmp_path: Path) -> None:
    family = Family(lambda: llama_config(tie_word_embeddings=False), "LlamaForCausalLM", {})
    base = build_base(tmp_path / "base", family)
    said = tell(
        family,
        base,
        tmp_path / "adapter",
        saving={"save_embedding_layers": False},
        target_modules=["model.embed_tokens", "lm_head"],
    )
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_says(family, tmp_path / "out", said)
