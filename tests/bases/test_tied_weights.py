"""An adapter on tied embeddings: what it changed by itself gets a tensor by itself, and the model speaks as trained.

The oracle is the forward pass of PEFT's unmerged adapter, for PEFT's own merge writes into the tensor that both
sides share.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import header, picture, raw_tensors, read_tensors, same_bits
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    MLP,
    POSITIONS,
    SIZES,
    TOKENS,
    VOCABULARY,
    Family,
    adapt,
    bloom_config,
    build_base,
    config_of,
    load,
    opt_config,
    output_of,
)
from torch import Tensor

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = FAMILIES["tied llama"]


def masked_config(name: str) -> Callable[[], Any]:
    def build() -> Any:
        return getattr(transformers, name)(**SIZES, embedding_size=HIDDEN, pad_token_id=0)

    return build


def whisper_config() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=MLP,
        decoder_ffn_dim=MLP,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def gemma3_config() -> Any:
    text = {**SIZES, "num_key_value_heads": HEADS // 2, "head_dim": 8}
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "image_size": 16,
        "patch_size": 4,
    }
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def bart_config() -> Any:
    return transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=MLP,
        decoder_ffn_dim=MLP,
        max_position_embeddings=POSITIONS,
    )


def sound() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": TOKENS[:, :4]}


@dataclasses.dataclass(frozen=True)
class Tied:
    """A family that ties, and the names of what it ties: modules in memory, tensors on disk."""

    family: Family
    embedding: str
    head: str
    embedding_on_disk: str
    head_on_disk: str
    body: str = "q_proj"
    more: tuple[str, ...] = ()  # other tensors that an untied file must hold


def family(config: Callable[[], Any], model: str, **more: Any) -> Family:
    return Family(config, model, {}, **more)


MASKED_HEAD = ("cls.predictions.decoder", "cls.predictions.decoder.weight")
TIED_FAMILIES: Mapping[str, Tied] = {
    "llama": Tied(TIED, "model.embed_tokens", "lm_head", EMBEDDING, HEAD),
    "gpt2": Tied(FAMILIES["gpt2"], "transformer.wte", "lm_head", "transformer.wte.weight", HEAD, "c_attn"),
    "opt": Tied(
        family(opt_config, "OPTForCausalLM"),
        "model.decoder.embed_tokens",
        "lm_head",
        "model.decoder.embed_tokens.weight",
        HEAD,
    ),
    "bloom": Tied(
        family(bloom_config, "BloomForCausalLM"),
        "transformer.word_embeddings",
        "lm_head",
        "transformer.word_embeddings.weight",
        HEAD,
        "query_key_value",
    ),
    "bert": Tied(
        family(masked_config("BertConfig"), "BertForMaskedLM"),
        "bert.embeddings.word_embeddings",
        MASKED_HEAD[0],
        "bert.embeddings.word_embeddings.weight",
        MASKED_HEAD[1],
        "query",
        ("cls.predictions.decoder.bias",),
    ),
    "roberta": Tied(
        family(masked_config("RobertaConfig"), "RobertaForMaskedLM"),
        "roberta.embeddings.word_embeddings",
        "lm_head.decoder",
        "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.weight",
        "query",
        ("lm_head.decoder.bias",),
    ),
    "electra": Tied(
        family(masked_config("ElectraConfig"), "ElectraForMaskedLM"),
        "electra.embeddings.word_embeddings",
        "generator_lm_head",
        "electra.embeddings.word_embeddings.weight",
        "generator_lm_head.weight",
        "query",
    ),
    "whisper": Tied(
        family(whisper_config, "WhisperForConditionalGeneration", inputs=sound),
        "model.decoder.embed_tokens",
        "proj_out",
        "model.decoder.embed_tokens.weight",
        "proj_out.weight",
    ),
    "gemma3 with pictures": Tied(
        family(gemma3_config, "Gemma3ForConditionalGeneration"),
        "model.language_model.embed_tokens",
        "lm_head",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ),
    "bart": Tied(
        family(bart_config, "BartForConditionalGeneration"),
        "model.decoder.embed_tokens",
        "lm_head",
        "model.decoder.embed_tokens.weight",
        HEAD,
        more=("model.encoder.embed_tokens.weight",),
    ),
}


@dataclasses.dataclass
class Trained:
    """A tied base and an adapter on disk, and what the unmerged adapter says."""

    family: Family
    base: Path
    adapter: Path
    unmerged: Tensor
    plain: Tensor

    def merged(self, out: Path, **settings: Any) -> loratool.MergeReport:
        report = loratool.merge(self.base, [self.adapter], out, **settings)
        found = output_of(load(self.family, out), self.family.inputs())
        largest = float(self.unmerged.abs().max())
        assert float((found - self.unmerged).abs().max()) <= 1e-5 * largest
        assert float((self.plain - self.unmerged).abs().max()) > 0.01 * largest, "the adapter says nothing"
        return report


def train(
    folder: Path, family: Family, base: Path | None = None, *, save: Mapping[str, Any] | None = None, **settings: Any
) -> Trained:
    """An adapter with random values, saved by PEFT, on a base that transformers saved."""
    base = base or build_base(folder / "base", family)
    model = load(family, base)
    plain = output_of(model, family.inputs())
    wrapped = adapt(model, **settings)
    unmerged = output_of(wrapped, family.inputs())
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    wrapped.save_pretrained(folder / "adapter", **(save or {}))
    return Trained(family, base, folder / "adapter", unmerged, plain)


def scaled_product(adapter: Path, module: str) -> Tensor:
    """s·BA of a linear module, or (s·BA)ᵀ of an embedding, in float64."""
    found: Tensor
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    stem = f"base_model.model.{module}."
    if f"{stem}lora_A.weight" in tensors:
        found = scale * tensors[f"{stem}lora_B.weight"].double() @ tensors[f"{stem}lora_A.weight"].double()
    else:
        found = scale * (tensors[f"{stem}lora_embedding_B"].double() @ tensors[f"{stem}lora_embedding_A"].double()).T
    return found


SAVES = {"with the embeddings saved": {}, "without": {"save_embedding_layers": False}}
SIDES = {"head": ["head"], "embedding": ["embedding"], "both": ["embedding", "head"]}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED_FAMILIES)
def test_lora_on_tied_embeddings_gives_each_side_its_own_tensor(tmp_path: Path, name: str, side: str) -> None:
    tied = TIED_FAMILIES[name]
    targets = [getattr(tied, part) for part in SIDES[side]]
    if name == "bart" and side == "embedding":
        targets = ["model.decoder.embed_tokens"]
    case = train(tmp_path, tied.family, target_modules=[*targets, tied.body], save=SAVES["without"])
    before = read_tensors(case.base)
    shared = "model.shared.weight" if name == "bart" else tied.embedding_on_disk
    assert shared in before
    assert tied.head_on_disk not in before
    report = case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    added = {tied.head_on_disk, *tied.more, *({tied.embedding_on_disk} - set(before))}
    assert set(after) == set(before) | added
    for tensor, module, part in (
        (tied.embedding_on_disk, tied.embedding, "embedding"),
        (tied.head_on_disk, tied.head, "head"),
    ):
        wanted = before[shared].double()
        if part in SIDES[side]:
            wanted = wanted + scaled_product(case.adapter, module)
            assert float((after[tensor].double() - wanted).abs().max()) <= 1e-6
        else:
            assert same_bits(after[tensor], before[shared])
    assert "config.json: tie_word_embeddings set to false" in list(map(str, report.notes))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("side", SIDES)
def test_the_flag_is_off_wherever_the_config_ties_and_the_rest_of_it_stays(
    tmp_path: Path, side: str, save: str
) -> None:
    tied = TIED_FAMILIES["gemma3 with pictures"]
    targets = [getattr(tied, part) for part in SIDES[side]]
    case = train(tmp_path, tied.family, target_modules=[*targets, "q_proj"], save=SAVES[save])
    case.merged(tmp_path / "out")
    before, after = config_of(case.base), config_of(tmp_path / "out")
    assert before["tie_word_embeddings"] is before["text_config"]["tie_word_embeddings"] is True
    assert list(after) == list(before)
    text = {**before["text_config"], "tie_word_embeddings": False}
    assert after == {**before, "tie_word_embeddings": False, "text_config": text}
    assert (tmp_path / "out/config.json").read_text() == json.dumps(after, indent=2) + "\n"


def test_a_flag_that_the_config_does_not_name_is_written(tmp_path: Path) -> None:
    tied = TIED_FAMILIES["gemma3 with pictures"]
    case = train(tmp_path, tied.family, target_modules=["lm_head", "q_proj"], save=SAVES["without"])
    config = config_of(case.base)
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (case.base / "config.json").write_text(json.dumps(config))
    case.merged(tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert after["tie_word_embeddings"] is after["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_factors_that_training_kept_tied_are_added_once_and_stay_tied(tmp_path: Path, targets: list[str]) -> None:
    case = train(tmp_path, TIED, target_modules=[*targets, "q_proj"], ensure_weight_tying=True, save=SAVES["without"])
    saved = read_tensors(case.adapter / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_A.weight" in saved
    case.merged(tmp_path / "out")
    before, after = read_tensors(case.base), read_tensors(tmp_path / "out")
    assert set(after) == set(before)
    wanted = before[EMBEDDING].double() + scaled_product(case.adapter, "lm_head")
    assert float((after[EMBEDDING].double() - wanted).abs().max()) <= 1e-6
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_factors_that_differ_by_one_bit_are_not_taken_for_tied(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["embed_tokens"], ensure_weight_tying=True, save=SAVES["without"])
    file = case.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    down = tensors["base_model.model.lm_head.lora_A.weight"]
    down[1, 2] = torch.nextafter(down[1, 2], torch.tensor(9.0))
    save_file(tensors, file)
    case.merged(tmp_path / "out")
    assert HEAD in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_side_saved_whole_replaces_that_side_only(tmp_path: Path, saved: list[str]) -> None:
    case = train(tmp_path, TIED, target_modules=["q_proj"], modules_to_save=saved)
    case.merged(tmp_path / "out")
    before, after = read_tensors(case.base), read_tensors(tmp_path / "out")
    own = read_tensors(case.adapter / "adapter_model.safetensors")
    for tensor, module in ((EMBEDDING, "embed_tokens"), (HEAD, "lm_head")):
        assert same_bits(after[tensor], own[f"base_model.model.{tensor}"] if module in saved else before[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_both_sides_saved_whole_and_alike_stay_one_tensor(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    own = read_tensors(case.adapter / "adapter_model.safetensors")
    assert same_bits(own[f"base_model.model.{EMBEDDING}"], own[f"base_model.model.{HEAD}"])
    case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert HEAD not in after
    assert same_bits(after[EMBEDDING], own[f"base_model.model.{EMBEDDING}"])
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("target", ["lm_head", "shared", "decoder.embed_tokens"])
def test_a_model_that_computes_otherwise_when_untied_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, target: str
) -> None:
    config = FAMILIES["t5"].config().to_dict()
    classes = {"t5": ("T5Config", "T5"), "mt5": ("MT5Config", "MT5"), "umt5": ("UMT5Config", "UMT5")}[name]
    built = family(
        lambda: getattr(transformers, classes[0])(**{k: v for k, v in config.items() if k != "model_type"}),
        f"{classes[1]}ForConditionalGeneration",
        inputs=FAMILIES["t5"].inputs,
    )
    case = train(tmp_path, built, target_modules=[target, "q"], save=SAVES["without"])
    before = picture(case.base), picture(case.adapter)
    (tmp_path / "home").mkdir()
    assert run(["merge", str(case.base), str(case.adapter), "-o", str(tmp_path / "home/out")]) == 4
    message = capsys.readouterr().err
    assert f"a {name} model computes something else when they are untied" in message
    assert (picture(case.base), picture(case.adapter)) == before
    assert list((tmp_path / "home").iterdir()) == []


def test_a_base_that_says_it_computes_alike_whatever_is_tied_is_edited_where_nothing_must_be_untied(
    tmp_path: Path,
) -> None:
    family = FAMILIES["t5"]
    case = train(tmp_path, family, target_modules=["q", "v"])
    case.merged(tmp_path / "out")
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(case.base))


# -- tokens ------------------------------------------------------------------------------------------

ROWS: Mapping[str, tuple[dict[str, Any], bool]] = {  # settings → do both sides stay one tensor?
    "of the embedding": ({"trainable_token_indices": [7, 3]}, True),
    "of both, alike": ({"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}}, True),
    "of both, others": ({"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}, False),
    "of the head": ({"trainable_token_indices": {"lm_head": [7, 3]}}, False),
    "of the embedding, and LoRA on the head": (
        {"trainable_token_indices": [7, 3], "target_modules": ["q_proj", "lm_head"]},
        False,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_tokens_go_where_training_had_them(tmp_path: Path, name: str) -> None:
    settings, tied = ROWS[name]
    case = train(tmp_path, TIED, **{"target_modules": ["q_proj"], **settings})
    case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert (HEAD in after) is not tied
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is tied
    own = read_tensors(case.adapter / "adapter_model.safetensors")
    for module, tensor in (("model.embed_tokens", EMBEDDING), ("lm_head", HEAD)):
        rows = own.get(f"base_model.model.{module}.token_adapter.trainable_tokens_delta")
        if rows is not None and len(rows) == 2:
            assert same_bits(after[tensor][[7, 3]], rows)


# -- what the base says about itself -----------------------------------------------------------------


def with_head(base: Path, head: Tensor | None = None, **config: Any) -> None:
    """Write the head of a tied base into its file too, and change its config; None takes an entry out."""
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = (tensors[EMBEDDING] if head is None else head).clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    table = {**config_of(base), **config}
    (base / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not None}, indent=2) + "\n")


@pytest.mark.parametrize("side", SIDES)
def test_a_head_on_disk_with_the_embeddings_values_is_tied_where_the_config_says_so(tmp_path: Path, side: str) -> None:
    base = build_base(tmp_path / "base", TIED)
    with_head(base)
    targets = [getattr(TIED_FAMILIES["llama"], part) for part in SIDES[side]]
    case = train(tmp_path, TIED, base, target_modules=[*targets, "q_proj"])
    case.merged(tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(base))


def test_rows_of_tokens_go_to_both_tensors_of_a_tied_base_that_holds_both(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", TIED)
    with_head(base)
    case = train(tmp_path, TIED, base, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert same_bits(after[EMBEDDING], after[HEAD])
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("flag", [None, False, True])
def test_a_head_on_disk_with_values_of_its_own_is_not_tied_whatever_the_config_says(
    tmp_path: Path, flag: bool | None
) -> None:
    base = build_base(tmp_path / "base", TIED)
    own = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(2)) * 0.1
    with_head(base, own, tie_word_embeddings=flag)
    case = train(tmp_path, TIED, base, target_modules=["lm_head", "embed_tokens"])
    case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    wanted = own.double() + scaled_product(case.adapter, "lm_head")
    assert float((after[HEAD].double() - wanted).abs().max()) <= 1e-6
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_config_that_says_nothing_ties_a_head_that_is_not_on_disk(tmp_path: Path, name: str) -> None:
    tied = TIED_FAMILIES[name]
    base = build_base(tmp_path / "base", tied.family)
    config = config_of(base)
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    case = train(tmp_path, tied.family, base, target_modules=[tied.embedding, tied.body])
    case.merged(tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert same_bits(after[tied.head_on_disk], read_tensors(base)[tied.embedding_on_disk])
    assert list(config_of(tmp_path / "out")) == [*config, "tie_word_embeddings"]
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_missing_head_that_is_not_tied_is_an_error(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["lm_head"], save=SAVES["without"])
    config = {**config_of(case.base), "tie_word_embeddings": False}
    (case.base / "config.json").write_text(json.dumps(config))
    with pytest.raises(loratool.FitError, match=r"lm_head\.weight: the base has no such weight and does not tie"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out")


def test_a_classifier_has_no_head_to_be_untied(tmp_path: Path) -> None:
    """Its config may tie all the same, for it was a language model's."""
    base = build_base(tmp_path / "base", TIED, model="LlamaForSequenceClassification")
    assert config_of(base)["tie_word_embeddings"] is True
    wrapped = adapt(transformers.LlamaForSequenceClassification.from_pretrained(base), target_modules=["embed_tokens"])
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert set(read_tensors(tmp_path / "out")) == set(read_tensors(base))
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_single_file_is_untied_and_the_config_that_it_lacks_is_told(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["embed_tokens", "q_proj"])
    report = loratool.merge(case.base / "model.safetensors", [case.adapter], tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert same_bits(after[HEAD], read_tensors(case.base)[EMBEDDING])
    notes = tuple(map(str, report.notes))
    at = notes.index("the base has no config.json; if you add one to the output, it must contain:")
    assert notes[at + 1] == "config.json: tie_word_embeddings set to false"


def test_an_embedding_with_a_head_of_unknown_name_is_refused(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["embed_tokens"], save=SAVES["without"])
    file = case.base / "model.safetensors"
    save_file({k.replace("model.embed_tokens", "model.words.wte"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(loratool.FitError, match=r"model\.words\.wte\.weight: the base may tie its head"):
        loratool.merge(case.base, [case.adapter], tmp_path / "out", maps=[r"embed_tokens=words.wte"])


# -- several adapters, strengths, and the files ------------------------------------------------------


def test_adapters_that_each_keep_the_tie_keep_it_together_and_one_that_does_not_breaks_it(tmp_path: Path) -> None:
    kept = train(tmp_path / "one", TIED, target_modules=["embed_tokens"], ensure_weight_tying=True)
    more = train(tmp_path / "two", TIED, kept.base, seed=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    alone = train(tmp_path / "three", TIED, kept.base, seed=5, target_modules=["lm_head"])
    loratool.merge(kept.base, [kept.adapter, more.adapter], tmp_path / "tied", weights=[1.0, -0.5])
    loratool.merge(kept.base, [kept.adapter, alone.adapter], tmp_path / "untied")
    before = read_tensors(kept.base)[EMBEDDING].double()
    first, second = (scaled_product(case.adapter, "lm_head") for case in (kept, more))
    tied, untied = read_tensors(tmp_path / "tied"), read_tensors(tmp_path / "untied")
    assert HEAD not in tied
    assert float((tied[EMBEDDING].double() - before - first + 0.5 * second).abs().max()) <= 1e-6
    assert float((untied[EMBEDDING].double() - before - first).abs().max()) <= 1e-6
    wanted = before + first + scaled_product(alone.adapter, "lm_head")
    assert float((untied[HEAD].double() - wanted).abs().max()) <= 1e-6


def test_an_untied_result_gives_its_adapter_back(tmp_path: Path) -> None:
    case = train(tmp_path, TIED, target_modules=["lm_head", "embed_tokens", "q_proj"])
    case.merged(tmp_path / "out")
    loratool.merge(tmp_path / "out", [case.adapter], tmp_path / "back", weights=[-1.0])
    before, after = read_tensors(case.base), read_tensors(tmp_path / "back")
    assert float((after[HEAD] - before[EMBEDDING]).abs().max()) <= 1e-6
    for name, tensor in before.items():
        assert float((after[name] - tensor).abs().max()) <= 1e-6


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_embedding_that_training_began_with_is_both_sides_beginning(tmp_path: Path, target: str) -> None:
    """The adapter was trained on another version of the base, whose embedding it saved."""
    case = train(tmp_path, TIED, target_modules=[target, "q_proj"])
    file = case.base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING] * 0.5}, file, {"format": "pt"})
    report = case.merged(tmp_path / "out")
    own = read_tensors(case.adapter / "adapter_model.safetensors")
    after = read_tensors(tmp_path / "out")
    (begun,) = [tensor for name, tensor in own.items() if name.endswith("base_layer.weight")]
    assert same_bits(after[HEAD if target == "embed_tokens" else EMBEDDING], begun)
    assert any("as the adapter saved it, replacing the base's" in note for note in map(str, report.notes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_is_the_formula_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = build_base(tmp_path / "base", TIED, dtype)
    adapt(load(TIED, base, dtype), target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    before, after = read_tensors(base)[EMBEDDING], read_tensors(tmp_path / "out")
    assert same_bits(after[EMBEDDING], before)
    wanted = (before.double() + scaled_product(tmp_path / "adapter", "lm_head")).to(dtype)
    assert after[HEAD].dtype == dtype
    assert float((after[HEAD] == wanted).double().mean()) >= 0.999
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in read_tensors(tmp_path / "wide").values()} == {torch.float32}


def test_the_new_tensor_is_in_the_index_and_in_every_way_to_pack_the_files(tmp_path: Path) -> None:
    sharded = dataclasses.replace(TIED, shard_size="20kB")
    case = train(tmp_path, sharded, target_modules=["lm_head"])
    case.merged(tmp_path / "out")
    name = "model.safetensors.index.json"
    before, after = (json.loads((model / name).read_text()) for model in (case.base, tmp_path / "out"))
    assert after["weight_map"] == {**before["weight_map"], HEAD: max(before["weight_map"].values())}
    size = VOCABULARY * HIDDEN
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * size
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] + size
    for path in case.base.glob("*.safetensors"):
        if path.name != after["weight_map"][HEAD]:
            assert header(tmp_path / "out" / path.name) == header(path)
    case.merged(tmp_path / "packed", shard_size=9000)
    assert raw_tensors(tmp_path / "packed") == raw_tensors(tmp_path / "out")


def test_a_dry_run_shows_the_new_tensor_and_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = train(tmp_path, TIED, target_modules=["lm_head"])
    assert run(["merge", str(case.base), str(case.adapter), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "lm_head.weight: written as a separate tensor; the base ties it to model.embed_tokens.weight" in shown
    assert "config.json: tie_word_embeddings set to false" in shown


def test_an_interrupted_merge_with_a_new_tensor_is_continued(tmp_path: Path) -> None:
    sharded = dataclasses.replace(TIED, shard_size="20kB")
    case = train(tmp_path, sharded, target_modules=["lm_head", "q_proj"])

    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.merge(case.base, [case.adapter], tmp_path / "out", workers=1, progress=stop)
    assert (tmp_path / "out.partial").is_dir()
    report = case.merged(tmp_path / "out")
    assert report.resumed
    loratool.merge(case.base, [case.adapter], tmp_path / "fresh")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "fresh")
