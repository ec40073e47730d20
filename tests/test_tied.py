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
from oracle import picture, read_tensors, same_bits
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP,
    POSITIONS,
    TOKENS,
    VOCABULARY,
    Family,
    adapt,
    build_base,
    load,
    output_of,
)
from torch import Tensor

import loratool
from loratool.cli import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = FAMILIES["tied llama"]


def opt_config() -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    )


def bloom_config() -> Any:
    return transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)


def masked_config(name: str) -> Callable[[], Any]:
    def build() -> Any:
        return getattr(transformers, name)(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            embedding_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
        )

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
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
    }
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

    def merged(self, out: Path, **settings: Any) -> loratool.merging.MergeReport:  # type: ignore[name-defined]
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


def config_of(model: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((model / "config.json").read_text())
    return table


def scaled_product(adapter: Path, module: str) -> Tensor:
    """s·BA of a linear module, or (s·BA)ᵀ of an embedding, in float64."""
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    stem = f"base_model.model.{module}."
    if f"{stem}lora_A.weight" in tensors:
        return scale * tensors[f"{stem}lora_B.weight"].double() @ tensors[f"{stem}lora_A.weight"].double()
    return scale * (tensors[f"{stem}lora_embedding_B"].double() @ tensors[f"{stem}lora_embedding_A"].double()).T


AWAITED = pytest.mark.xfail(reason="the weight that PEFT saves under a head is not read yet", strict=False)
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
    assert "config.json: tie_word_embeddings set to false" in report.notes


@AWAITED
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
    assert f"a {name} computes otherwise when they are untied" in message
    assert (picture(case.base), picture(case.adapter)) == before
    assert list((tmp_path / "home").iterdir()) == []
