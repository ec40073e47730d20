"""Published adapters of classifiers, transformers for signals and Whisper, through the commands that make adapters of them.

The first and the last block of each are enough, under their own names, with the heads that are saved whole. The files are
no part of the project (tests/adapters/test_real_adapters.py merges all of them), so that the tests are skipped without
them. Every result is held to the float64 formula, α/r · BA.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from oracle import PREFIX, config_scale, read_tensors
from paths import REAL
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.errors import FitError, InputError

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
# The types of models in their bases' config.json
CLASSIFIERS = {
    "distilbert-emotion": "distilbert",
    "bert-turkish-dupmts": "bert",
    "roberta-adalora": "roberta",
    "gpt2-seqcls-score": "gpt2",
}
OTHERS = {
    "seqcls-unknown-task-type": "distilbert",
    "eeg-one-row-head": "signals",
    "whisper-small-enczeroB": "whisper",
    "flan-t5-base-medqa": "t5",
}
EVERY = {**CLASSIFIERS, **OTHERS}
PAIR = re.compile(r"(?P<module>.+)\.lora_A(?:\.weight)?")


def first_and_last(tensor: str) -> bool:
    """Whether a tensor is in no block, or in the first or the last; Whisper's encoder was not trained."""
    return not re.search(r"\.(layers?|h|blocks?)\.(?!(0|5|11)\.)\d+\.", tensor) and ".encoder.layers.11" not in tensor


def some_of(name: str, folder: Path) -> Path:
    """A published adapter with some of its blocks."""
    folder.mkdir(parents=True)
    save_file(read_tensors(REAL / name, first_and_last), folder / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(REAL / name / "adapter_config.json", folder)
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of every layer, from the files alone."""
    scale, tensors = config_scale(folder), read_tensors(folder)
    found: dict[str, Tensor] = {}
    for name, down in tensors.items():
        if match := PAIR.fullmatch(name):
            strength = tensors.get(f"{match['module']}.lora_E", torch.ones(1)).double()
            up = tensors[name.replace("lora_A", "lora_B")].double()
            found[match["module"].removeprefix(PREFIX)] = scale * up @ (down.double() * strength)
    return found


def heads(folder: Path) -> dict[str, Tensor]:
    """What is saved whole."""
    return {
        name.replace(".modules_to_save.", "."): tensor
        for name, tensor in read_tensors(folder).items()
        if "lora_" not in name
    }


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm()) <= 2e-7 * float(wanted.norm())


def assert_times(found: Path, given: Path, factor: float) -> None:
    """All layers of an adapter are `factor` times those of another, and its heads are the same."""
    after, before = deltas(found), deltas(given)
    assert after.keys() == before.keys()
    for module, wanted in before.items():
        assert_near(after[module], factor * wanted)
    kept, saved = heads(found), heads(given)
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("name", EVERY)
def test_a_published_adapter_is_rescaled_summed_and_converted_by_the_formula(name: str, tmp_path: Path) -> None:
    """At half strength, in the sum with itself and in PEFT's layout every layer is the formula's, and heads are kept."""
    given = some_of(name, tmp_path / "given")
    loratool.rescale(given, tmp_path / "half", scale=0.5)
    loratool.combine([given, given], tmp_path / "twice")
    loratool.convert(given, tmp_path / "peft", to="peft")
    assert_times(tmp_path / "half", given, 0.5)
    assert_times(tmp_path / "twice", given, 2.0)
    assert_times(tmp_path / "peft", given, 1.0)
    (pair,) = loratool.compare([given, tmp_path / "half"]).totals.values()
    assert pair.cosine == pytest.approx(1.0, abs=1e-6)


BASES = {
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "roberta-base": "FacebookAI/roberta-base",
}  # where models are that the configs name without an owner


@pytest.mark.parametrize("name", EVERY)
def test_the_card_of_what_becomes_of_a_published_adapter_names_its_base_and_loads_it(name: str, tmp_path: Path) -> None:
    """As its config says, read by the Hub's own parser; a base without an owner with the one that it has now."""
    given = some_of(name, tmp_path / "given")
    loratool.rescale(given, tmp_path / "half", scale=0.5)
    config = json.loads((given / "adapter_config.json").read_text())
    card = ModelCard.load(tmp_path / "half" / "README.md")
    base = config["base_model_name_or_path"]
    assert card.data.base_model == ([BASES.get(base, base)] if base else None)
    assert card.data.library_name == "peft"
    heads = {"SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    loads = (
        "WhisperForConditionalGeneration" if name.startswith("whisper") else heads.get(config["task_type"], "AutoModel")
    )
    assert f'base = {loads}.from_pretrained("{BASES.get(base, base or "BASE")}")' in card.text


@pytest.mark.parametrize("name", EVERY)
def test_a_merge_of_some_blocks_is_proven(name: str, tmp_path: Path) -> None:
    """verify proves the merge into a base of the adapter's shapes, of which one tensor stays as it is."""
    given, base = some_of(name, tmp_path / "given"), tmp_path / "base"
    base.mkdir()
    turned = name.startswith("gpt2")  # Conv1D stores (in, out)
    shapes = {f"{m}.weight": (delta.T if turned else delta).shape for m, delta in deltas(given).items()}
    shapes |= {name.removeprefix(PREFIX): tensor.shape for name, tensor in heads(given).items()}
    draws = torch.Generator().manual_seed(1)
    tensors = {name: 0.1 * torch.randn(shape, generator=draws) for name, shape in {**shapes, "other": (3,)}.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": EVERY[name]}))
    loratool.merge(base, given, tmp_path / "merged")
    report = loratool.verify(tmp_path / "merged", base=base, adapters=[given])
    assert report.passes
    assert report.counts == {"identical": 1, "proven": len(shapes)}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_are_lost_by_name_where_a_dialect_or_a_server_takes_none(name: str, tmp_path: Path) -> None:
    given = some_of(name, tmp_path / "given")
    one = next(iter(heads(given))).removeprefix(PREFIX)
    for asked, who in (({"to": "mlx"}, "mlx cannot express"), ({"server": "vllm"}, "vLLM .* does not take all")):
        with pytest.raises(FitError, match=rf"(?s){who}.*{re.escape(one)}"):
            loratool.convert(given, tmp_path / "out", **asked)  # type: ignore[arg-type]  # one of two keywords
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EVERY)
def test_dialects_without_names_for_a_published_adapter_say_which_have_some(name: str, tmp_path: Path) -> None:
    """Those of image models, and those of models that the base is not."""
    given = some_of(name, tmp_path / "given")
    for dialect in ("kohya", "diffusers", "comfy", "lycoris"):
        with pytest.raises(InputError, match=rf"{dialect} is a dialect of image and video models.*--to peft, mlx"):
            loratool.convert(given, tmp_path / "out", to=dialect)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"other": torch.ones(2)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": EVERY[name]}))
    if name in OTHERS:
        for dialect in ("gguf", "torchtune"):
            with pytest.raises(InputError, match=f"type {EVERY[name]} is not supported"):
                loratool.convert(given, tmp_path / "out", to=dialect, base=base)


def test_cross_attention_is_never_fused(tmp_path: Path) -> None:
    """Queries of Whisper's decoder and keys of its encoder take in different things; its self-attention is fused."""
    given = some_of("whisper-small-enczeroB", tmp_path / "given")
    loratool.convert(given, tmp_path / "fused", to="peft-fused")
    found, wanted = deltas(tmp_path / "fused"), deltas(given)
    layer = "model.decoder.layers.11"
    assert_near(found[f"{layer}.encoder_attn.q_proj"], wanted[f"{layer}.encoder_attn.q_proj"])
    joined = found[f"{layer}.self_attn.qkv_proj"]
    assert_near(joined[:768], wanted[f"{layer}.self_attn.q_proj"])
    assert not joined[768:1536].any()
    assert_near(joined[1536:], wanted[f"{layer}.self_attn.v_proj"])
