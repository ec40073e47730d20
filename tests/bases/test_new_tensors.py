"""What an adapter brings that its base has not: heads for a task, and rows for new tokens.

The oracle is transformers: it loads the output as the class that was trained, with nothing missing, and that says
what PEFT's unmerged adapter said.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import header, picture, raw_tensors, read_tensors, same_bits
from peft_files import edit_config
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    Family,
    adapt,
    bert_config,
    build_base,
    config_of,
    gpt2_config,
    llama_config,
    load,
    output_of,
)
from torch import Tensor
from transformers.models.auto import modeling_auto

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PREFIX = "base_model.model."
LABELS = 5


@dataclasses.dataclass(frozen=True)
class Task:
    """A class with a head, the base that it is trained on, and how."""

    base: str  # the class on disk
    model: str  # the class that is trained
    config: Callable[[], Any]
    targets: tuple[str, ...]
    task: str | None  # of the adapter
    heads: tuple[str, ...]  # the new tensors
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def distilbert_config() -> Any:
    return transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    )


def roberta_config() -> Any:
    return transformers.RobertaConfig(**SIZES, pad_token_id=0)


def padded(config: Callable[[], Any]) -> Callable[[], Any]:
    """With a padding token, which classifiers of whole sequences want for more than one of them."""

    def build() -> Any:
        made = config()
        made.pad_token_id = 0
        return made

    return build


CLASSIFIER = ("classifier.weight", "classifier.bias")
TASKS: Mapping[str, Task] = {
    "llama, sequences": Task(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        padded(llama_config),
        ("q_proj",),
        "SEQ_CLS",
        ("score.weight",),
    ),
    "llama, tokens": Task(
        "LlamaForCausalLM",
        "LlamaForTokenClassification",
        llama_config,
        ("q_proj",),
        "TOKEN_CLS",
        ("score.weight", "score.bias"),
    ),
    "gpt2, sequences": Task(
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        padded(gpt2_config),
        ("c_attn",),
        "SEQ_CLS",
        ("score.weight",),
    ),
    "bare bert, sequences": Task(
        "BertModel", "BertForSequenceClassification", bert_config, ("query",), "SEQ_CLS", CLASSIFIER
    ),
    "bare bert without a task": Task(
        "BertModel",
        "BertForSequenceClassification",
        bert_config,
        ("query",),
        None,
        CLASSIFIER,
        {"modules_to_save": ["classifier"]},
    ),
    "masked bert, tokens": Task(
        "BertForMaskedLM", "BertForTokenClassification", bert_config, ("query",), "TOKEN_CLS", CLASSIFIER
    ),
    "masked bert, answers": Task(
        "BertForMaskedLM",
        "BertForQuestionAnswering",
        bert_config,
        ("query",),
        "QUESTION_ANS",
        ("qa_outputs.weight", "qa_outputs.bias"),
    ),
    "masked roberta, sequences": Task(
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        roberta_config,
        ("query",),
        "SEQ_CLS",
        tuple(f"classifier.{part}" for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")),
    ),
    "masked distilbert, sequences": Task(
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        distilbert_config,
        ("q_lin",),
        "SEQ_CLS",
        (*CLASSIFIER, "pre_classifier.weight", "pre_classifier.bias"),
        {"modules_to_save": ["pre_classifier", "classifier"]},
    ),
}


@dataclasses.dataclass
class Trained:
    family: Family
    base: Path
    adapter: Path
    unmerged: Tensor

    def says(self, out: Path) -> None:
        """The head of the base may be left over; nothing may be missing or of another shape."""
        model, info = self.family.cls.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert {name for name, keys in info.items() if keys} <= {"unexpected_keys"}, info
        found = output_of(model.eval(), self.family.inputs())
        assert float((found - self.unmerged).abs().max()) <= 1e-5 * float(self.unmerged.abs().max())


def train(folder: Path, task: Task, labels: int = LABELS, dtype: torch.dtype = torch.float32, **shards: Any) -> Trained:
    """A base of one class, and an adapter of another that PEFT saved."""
    base = build_base(folder / "base", Family(task.config, task.base, {}, **shards), dtype, model=task.base)
    labels = 2 if task.task == "QUESTION_ANS" else labels
    made = getattr(transformers, task.model)
    model = made.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True).eval()
    wrapped = adapt(model, target_modules=list(task.targets), task_type=task.task, **task.settings)
    wrapped.save_pretrained(folder / "adapter")
    family = Family(task.config, task.model, {})
    return Trained(family, base, folder / "adapter", output_of(wrapped, family.inputs()))


# -- heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_new_head_is_added_and_the_config_names_its_class_and_its_labels(tmp_path: Path, name: str) -> None:
    task = TASKS[name]
    case = train(tmp_path, task)
    before = read_tensors(case.base)
    assert not set(task.heads) & set(before)
    report = loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)
    after = read_tensors(tmp_path / "out")
    assert set(after) == set(before) | set(task.heads)
    saved = read_tensors(case.adapter / "adapter_model.safetensors")
    for head in task.heads:
        assert same_bits(after[head], saved[PREFIX + head])
    config = config_of(tmp_path / "out")
    assert config["architectures"] == [task.model]
    labels = 2 if task.task == "QUESTION_ANS" else LABELS
    assert config["id2label"] == {str(n): f"LABEL_{n}" for n in range(labels)}
    assert config["label2id"] == {f"LABEL_{n}": n for n in range(labels)}
    changed = {"architectures", "id2label", "label2id"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in config_of(case.base).items() if k not in changed
    }
    assert f'config.json: architectures set to ["{task.model}"]' in list(map(str, report.notes))
    case.says(tmp_path / "out")


def test_a_new_head_is_refused_by_default_and_the_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train(tmp_path, TASKS["llama, sequences"])
    before = picture(case.base), picture(case.adapter)
    (tmp_path / "home").mkdir()
    words = ["merge", str(case.base), str(case.adapter), "-o", str(tmp_path / "home/out")]
    assert run(words) == 4
    message = capsys.readouterr().err
    assert "score.weight: the base has no such weight; pass --allow-new-tensors to add it to the output" in message
    assert list((tmp_path / "home").iterdir()) == []
    assert (picture(case.base), picture(case.adapter)) == before
    assert run([*words, "--allow-new-tensors"]) == 0
    case.says(tmp_path / "home/out")


def test_a_part_of_the_class_that_nobody_saved_is_told(tmp_path: Path) -> None:
    """BERT's classifier reads a pooler; a masked language model is saved without one, and PEFT does not save it."""
    case = train(tmp_path, dataclasses.replace(TASKS["bare bert, sequences"], base="BertForMaskedLM"))
    report = loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)
    assert any("BertForSequenceClassification has a pooler" in note for note in map(str, report.notes))
    whole = train(tmp_path / "whole", TASKS["bare bert, sequences"])
    report = loratool.merge(whole.base, [whole.adapter], tmp_path / "out2", allow_new_tensors=True)
    assert not any("pooler" in note for note in map(str, report.notes))


def test_a_body_of_other_names_is_not_added_whatever_is_allowed(tmp_path: Path) -> None:
    case = train(tmp_path, TASKS["llama, sequences"])
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.final_norm.weight"] = torch.ones(32)
    save_file(tensors, file)
    edit_config(case.adapter, modules_to_save=["score", "final_norm"])
    with pytest.raises(loratool.FitError, match=r"model\.final_norm\.weight: the base has no such weight"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)


def test_a_head_for_another_number_of_labels_takes_the_place_of_the_bases_when_allowed(tmp_path: Path) -> None:
    task = dataclasses.replace(TASKS["bare bert, sequences"], base="BertForSequenceClassification")
    case = train(tmp_path, task)  # bert_config has three labels
    with pytest.raises(loratool.FitError) as refusal:
        loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert "the adapter's is [5, 32], but classifier.weight is [3, 32]: the numbers of labels differ" in str(
        refusal.value
    )
    assert "the adapter's is [5], but classifier.bias is [3]" in str(refusal.value)
    assert str(refusal.value).count("--allow-new-tensors") == 2
    loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)
    assert len(config_of(tmp_path / "out")["id2label"]) == LABELS
    case.says(tmp_path / "out")


def test_a_head_of_the_same_shape_needs_no_leave_and_keeps_the_labels_names(tmp_path: Path) -> None:
    task = dataclasses.replace(TASKS["bare bert, sequences"], base="BertForSequenceClassification")
    case = train(tmp_path, task, labels=3)
    config = {**config_of(case.base), "id2label": {"0": "bad", "1": "good", "2": "none"}}
    (case.base / "config.json").write_text(json.dumps(config))
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_new_head_has_the_dtype_that_most_of_the_base_has(tmp_path: Path, dtype: torch.dtype) -> None:
    case = train(tmp_path, TASKS["llama, sequences"], dtype=dtype)
    file = case.adapter / "adapter_model.safetensors"
    save_file({k: v.float() for k, v in load_file(file).items()}, file)
    head = load_file(file)[f"{PREFIX}score.weight"]
    loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)
    after = read_tensors(tmp_path / "out")
    assert same_bits(after["score.weight"], head.to(dtype))
    assert Counter(t.dtype for t in after.values()) == {dtype: len(after)}


def test_the_index_and_the_shards_hold_what_is_new(tmp_path: Path) -> None:
    case = train(tmp_path, TASKS["llama, sequences"], shard_size="20kB")
    loratool.merge(case.base, [case.adapter], tmp_path / "out", allow_new_tensors=True)
    name = "model.safetensors.index.json"
    before, after = (json.loads((model / name).read_text()) for model in (case.base, tmp_path / "out"))
    last = max(before["weight_map"].values())
    assert after["weight_map"] == {**before["weight_map"], "score.weight": last}
    tensors = read_tensors(tmp_path / "out")
    assert after["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert after["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    assert "score.weight" in header(tmp_path / "out" / last)
    case.says(tmp_path / "out")
    loratool.merge(case.base, [case.adapter], tmp_path / "packed", shard_size=30_000, allow_new_tensors=True)
    assert raw_tensors(tmp_path / "packed") == raw_tensors(tmp_path / "out")
    case.says(tmp_path / "packed")


def test_a_dry_run_shows_what_is_new_and_what_the_config_will_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train(tmp_path, TASKS["llama, sequences"])
    words = ["merge", str(case.base), str(case.adapter), "-o", str(tmp_path / "out"), "--dry-run"]
    assert run([*words, "--allow-new-tensors"]) == 0
    shown = capsys.readouterr().out
    assert "score.weight: [5, 32] as the adapter saved it, which the base lacks" in shown
    assert 'config.json: architectures set to ["LlamaForSequenceClassification"]' in shown
    assert "config.json: id2label set to 5 entries" in shown
    assert not (tmp_path / "out").exists()


TASK_MAPPINGS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
BASE_MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


@pytest.mark.parametrize("task", TASK_MAPPINGS)
def test_the_class_of_a_task_is_the_one_that_transformers_would_choose(tmp_path: Path, task: str) -> None:
    from loratool.adapters.training import Training
    from loratool.bases.side_files import class_with_head

    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    wrong = {}
    for family, wanted in TASK_MAPPINGS[task].items():
        names = {mapping.get(family) for mapping in BASE_MAPPINGS}
        for name in filter(None, names):
            for known in [name] if isinstance(name, str) else name:
                (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "architectures": [known]}))
                found = class_with_head(loratool.open_checkpoint(tmp_path), Training(task=task))
                if found != wanted:
                    wrong[known] = (found, wanted)
    assert wrong == {}


# -- tokens ------------------------------------------------------------------------------------------

MORE = VOCABULARY + 4
NEW_TOKENS = torch.tensor([[5, VOCABULARY, 3, MORE - 1, 41, 9], [1, 60, VOCABULARY + 1, 7, 33, MORE - 2]])
FORMS: Mapping[str, Mapping[str, Any]] = {
    "both saved whole": {"target_modules": ["q_proj"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, VOCABULARY, MORE - 1]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "one module to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def grow(folder: Path, name: str, form: str, dtype: torch.dtype = torch.float32) -> Trained:
    """An adapter that was trained with four more tokens than its base has."""
    family = dataclasses.replace(FAMILIES[name], inputs=lambda: {"input_ids": NEW_TOKENS})
    base = build_base(folder / "base", family, dtype)
    model = load(family, base, dtype)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    wrapped = adapt(model, **FORMS[form])
    wrapped.save_pretrained(folder / "adapter")
    return Trained(family, base, folder / "adapter", output_of(wrapped, family.inputs()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tied llama", "llama"])
def test_new_tokens_come_in_every_form_that_peft_saves_them(tmp_path: Path, name: str, form: str) -> None:
    case = grow(tmp_path, name, form)
    if name == "llama" and form in ("LoRA on the embedding", "LoRA on the head"):
        with pytest.raises(loratool.FitError) as refusal:  # PEFT saves the rows of one side only
            loratool.merge(case.base, [case.adapter], tmp_path / "out")
        assert str(MORE) in str(refusal.value)
        assert str(VOCABULARY) in str(refusal.value)
        assert "model.unload().save_pretrained(" in str(refusal.value)
        return
    report = loratool.merge(case.base, [case.adapter], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["vocab_size"] == MORE
    assert f"config.json: vocab_size set to {MORE}" in list(map(str, report.notes))
    after = read_tensors(tmp_path / "out")
    assert {len(after[n]) for n in ("model.embed_tokens.weight", "lm_head.weight") if n in after} == {MORE}
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in after)
    case.says(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_tokens_are_written_in_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    case = grow(tmp_path, "llama", "both saved whole", dtype)
    file = case.adapter / "adapter_model.safetensors"
    save_file({k: v.float() for k, v in load_file(file).items()}, file)
    saved = load_file(file)
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert same_bits(after[name], saved[PREFIX + name].to(dtype))


def test_an_adapter_that_brought_tokens_cannot_be_taken_out_again(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    with pytest.raises(loratool.FitError, match="cannot undo"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out", weights=[-1.0])


def test_an_adapter_of_the_smaller_vocabulary_changes_the_rows_that_it_knew(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    small = adapt(load(FAMILIES["llama"], case.base), seed=7, target_modules=["embed_tokens"])
    small.save_pretrained(tmp_path / "small", save_embedding_layers=False)
    loratool.merge(case.base, [case.adapter, tmp_path / "small"], tmp_path / "out")
    factors = read_tensors(tmp_path / "small/adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    wanted = read_tensors(case.adapter / "adapter_model.safetensors")[f"{PREFIX}model.embed_tokens.weight"].double()
    wanted[:VOCABULARY] += (b @ a).T * 6 / 4
    found = read_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert float((found.double() - wanted).abs().max()) <= 1e-6


def test_two_adapters_with_tokens_of_their_own_cannot_both_win(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    shutil.copytree(case.adapter, tmp_path / "other")
    file = tmp_path / "other/adapter_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(file).items()}, file)
    with pytest.raises(loratool.FitError, match=r"model\.embed_tokens\.weight: replaced by several adapters"):
        loratool.merge(case.base, [case.adapter, tmp_path / "other"], tmp_path / "out")


def test_two_adapters_that_were_trained_on_the_same_new_tokens_meet(tmp_path: Path) -> None:
    case = grow(tmp_path, "tied llama", "LoRA on both")
    loratool.merge(case.base, [case.adapter, case.adapter], tmp_path / "out", weights=[0.5, 0.5])
    assert config_of(tmp_path / "out")["vocab_size"] == MORE
    case.says(tmp_path / "out")


def test_an_adapter_of_weight_zero_brings_nothing_new(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    adapt(load(FAMILIES["llama"], case.base), target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    loratool.merge(case.base, [case.adapter, tmp_path / "plain"], tmp_path / "out", weights=[0.0, 1.0])
    assert len(read_tensors(tmp_path / "out")["lm_head.weight"]) == VOCABULARY
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_a_part_of_the_config_gets_the_new_size_too(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    config = config_of(case.base)
    nested = {
        **config,
        "text_config": {"vocab_size": VOCABULARY, "hidden_size": 32},
        "vision_config": {"vocab_size": 7},
    }
    (case.base / "config.json").write_text(json.dumps(nested))
    loratool.merge(case.base, [case.adapter], tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert (after["vocab_size"], after["text_config"]["vocab_size"]) == (MORE, MORE)
    assert after["vision_config"] == {"vocab_size": 7}
    assert list(after) == list(nested)


def test_a_bias_with_an_entry_for_each_token_that_did_not_grow_is_told(tmp_path: Path) -> None:
    case = grow(tmp_path, "llama", "both saved whole")
    file = case.base / "model.safetensors"
    shards = sorted(case.base.glob("model*.safetensors"))
    tensors = {**load_file(shards[-1]), "lm_head.bias": torch.zeros(VOCABULARY)}
    save_file(tensors, shards[-1])
    index = case.base / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.bias"] = shards[-1].name
    index.write_text(json.dumps(table))
    assert not file.exists()
    with pytest.raises(loratool.FitError, match=r"lm_head\.bias has 96 in the base"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out")
